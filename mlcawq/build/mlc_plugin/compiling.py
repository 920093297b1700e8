"""What mlc_llm's compile step needs beside mlc_llm."""

from __future__ import annotations


def install() -> None:
    """Prepare mlc_llm's compile step; called after mlc_llm is imported."""
