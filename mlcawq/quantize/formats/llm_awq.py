"""The files of llm-awq (mit-han-lab), second version: `awq.entry` and TinyChat load them.

Packed as AutoAWQ's "gemv_fast", which is made after it, with the zero points called `scaled_zeros`.
llm-awq itself saves a pickled state dict; both of its loaders take safetensors as well, which
cannot run code: one file, since TinyChat takes no more. TinyChat wants every tensor of the model in
it, a head that is tied to the embedding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlcawq.quantize.formats.awq_gemv_fast import AwqGemvFast
from mlcawq.quantize.formats.base import LinearSpec


class LlmAwq(AwqGemvFast):
    """See the module."""

    name = "llm-awq"
    version = "llm-awq"
    one_file = True

    @property
    def zeros_part(self) -> str:
        """See `AwqStorage.zeros_part`."""
        return "scaled_zeros"

    def quantization_config(
        self, linears: Mapping[str, LinearSpec], kept: Sequence[str]
    ) -> dict[str, Any]:
        """As llm-awq's own conversion for the hub writes it: `backend` says whose file it is."""
        config = super().quantization_config(linears, kept)
        return {**config, "version": "gemv", "backend": "llm-awq"}
