"""scripts/bench_quantize_block.py measures every block of what it writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_quantize_block import word_tokenizer, write_model
from peers.runners import Ours


def test_every_block_is_timed_and_weighed(tmp_path: Path) -> None:
    shape = argparse.Namespace(hidden=128, intermediate=256, heads=4, kv_heads=2, vocab=64)
    model = write_model(tmp_path / "model", shape, 3, word_tokenizer(64))
    job = {
        "task": "quantize",
        "method": "awq",
        "model": str(model),
        "tokens": [list(range(32)), list(range(32, 64))],
        "bits": 4,
        "group_size": 128,
    }
    result = Ours().run(job)
    assert len(result["block_seconds"]) == len(result["block_rss_mib"]) == 3
    assert sum(result["block_seconds"]) <= result["seconds"] * 1.001
    assert max(result["block_rss_mib"]) <= result["peak_rss_mib"]
