"""scripts/bench_quantize_block.py measures every block of what it writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_quantize_block import Measured, lines, measure, word_tokenizer, write_model
from peers.runners import AutoAwq, LlmCompressor, Ours, Peer

from mlcawq.errors import UserError


def test_every_block_is_timed_and_weighed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shape(), 3, word_tokenizer(64))
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


def shape(**changes: int) -> argparse.Namespace:
    values = {
        "hidden": 128,
        "intermediate": 256,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 64,
        "samples": 2,
        "seq_len": 32,
        "bits": 4,
        "group_size": 128,
        "blocks": 2,
        "peer_blocks": 1,
        "repeats": 1,
    }
    return argparse.Namespace(**{**values, **changes})


def test_ours_counts_by_block() -> None:
    (found,), busy = measure(shape(), [(Ours(), "awq")])
    assert found.ours
    assert (found.label, len(found.block_rss_mib)) == ("awq", 2)
    assert found.seconds > 0
    assert found.cpu_seconds > 0
    assert busy >= 0


@pytest.mark.peers
@pytest.mark.parametrize("peer", [AutoAwq, LlmCompressor], ids=lambda peer: peer.key)
def test_peers_count_by_block(peer: type[Peer]) -> None:
    try:
        runner = peer()
    except UserError as error:
        pytest.skip(str(error))
    label = next(iter(runner.methods))
    (found,), _ = measure(shape(), [(runner, label)])
    assert (found.label, found.ours, found.block_rss_mib) == (label, False, ())
    assert found.seconds > 0
    assert found.cpu_seconds > 0
    assert found.peak_rss_mib > 100


def test_peers_are_set_against_ours_of_the_same_kind() -> None:
    table = lines(
        [
            Measured("awq", True, 2, 4, 1000, block_rss_mib=(900, 900.4)),
            Measured("llm-compressor AWQ", False, 30, 40, 2500),
            Measured("llm-compressor GPTQ", False, 30, 40, 2500),
            Measured("AutoAWQ", False, 50, 60, 2000, packing_seconds=10),
        ]
    )
    assert [line.split()[-3:] for line in table[1:3]] == [
        ["2.0", "4.0", "1000"],
        ["30.0", "40.0", "2500"],
    ]
    assert table[6:] == [
        "AutoAWQ takes 25.0 times as long as awq (20.0 without its packing, 15.0 in CPU time) and "
        "2.0 times the memory",
        "llm-compressor AWQ takes 15.0 times as long as awq (10.0 in CPU time) and 2.5 times the "
        "memory",
        "awq, MiB resident after each block: 900, 900",
    ]
