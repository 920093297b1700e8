"""Tiny models, really built: what the tests of the engine and of chat run."""

from __future__ import annotations

import shutil
import tempfile
from atexit import register
from functools import cache
from pathlib import Path

from mlcawq.build.compile import compile_model
from mlcawq.build.convert_weight import convert_weight
from mlcawq.build.gen_config import gen_config
from mlcawq.checkpoint.config import read_config

CONTEXT, CHUNK, BATCH = 256, 32, 4


@cache
def built_tiny_llama() -> tuple[Path, Path]:
    """A random llama checkpoint (float32, 2 blocks) and the folder built from it for the CPU.

    Built once a test process; tests that change the folder copy it.
    """
    from tiny_models import make_tiny_model

    root = Path(tempfile.mkdtemp(prefix="mlcawq-tests-"))
    register(shutil.rmtree, root, ignore_errors=True)
    checkpoint = make_tiny_model(root / "checkpoint", dtype="float32", seed=0)
    return checkpoint, build(checkpoint, root / "built")


def build(checkpoint: Path, out: Path) -> Path:
    """The three steps of `mlcawq build`, with sizes small enough to run into."""
    out.mkdir()
    sizes = {
        "context_window_size": CONTEXT,
        "prefill_chunk_size": CHUNK,
        "max_batch_size": BATCH,
    }
    gen_config(checkpoint, out, **sizes)
    convert_weight(checkpoint, out)
    compile_model(read_config(checkpoint), out / "lib-cpu.so", "cpu:native", **sizes)
    return out
