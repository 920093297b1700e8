"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# The tests never reach the network; a hub look-up fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A job in the background of a script ignores Ctrl-C, and so would every program that tests start
# and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing in a test writes an empty page: its plots take longer than a tiny model does."""
    if "mlcawq.quantize.report.files" in sys.modules:
        monkeypatch.setattr("mlcawq.quantize.report.files.report_page", lambda report: "")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama checkpoint (2 blocks, hidden 128, GQA 4/2, fp16)."""
    from tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def mlc_python() -> Path:
    """The Python of an environment that has mlc_llm, for tests marked `mlc_llm`."""
    named = os.environ.get("MLCAWQ_MLC_PYTHON")
    if not named:
        pytest.skip("MLCAWQ_MLC_PYTHON does not name the Python of an environment with mlc_llm")
    return Path(named)
