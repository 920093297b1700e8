"""scripts/bench_vulkan.py on whatever Vulkan device is there, with a small linear."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.tir_kernels.backends import backend_named

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_vulkan
from benchmarks.cases import MODELS, Linear
from benchmarks.vulkan import Timer, WrongResultError, contenders, measure_linear

SMALL = Linear("small", "o_proj", 256, 64)


@pytest.fixture
def timer() -> Timer:
    backend_named("vulkan")
    return Timer(tvm.device("webgpu", 0), batch=0.001, budget=0.01, rotated=2**16)


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    backend_named("vulkan")
    monkeypatch.setitem(MODELS, "qwen2.5-0.5b", (SMALL,))
    options = "--rows 1 9 --rotate 1 --seconds 0.01 --models qwen2.5-0.5b"
    monkeypatch.setattr(sys, "argv", ["bench_vulkan.py", *options.split(), "--json"])
    bench_vulkan.main()
    result = json.loads(capsys.readouterr().out)
    one, nine = result["rows"]
    assert (one["m"], nine["m"]) == (1, 9)
    for row in (one, nine):
        assert set(row["seconds"]) == {"ours", "ours, stock", "generic"}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["share_of_copy"] > 0
    monkeypatch.setattr(sys, "argv", ["bench_vulkan.py", *options.split(), "--dtype", "float32"])
    bench_vulkan.main()
    head, titles, *lines = capsys.readouterr().out.splitlines()
    assert "activations: float32" in head
    assert "generic" not in titles.split("generic/ours")[0]
    assert len(lines) == 2
    assert all(line.startswith("small") and line.endswith("%") for line in lines)


def test_nothing_wrong_is_timed(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng()
    ours = contenders("float16")[0]
    monkeypatch.setattr(Timer, "seconds", lambda *_: pytest.fail("it was timed"))
    strict = dataclasses.replace(ours, tolerance=1e-9)
    with pytest.raises(WrongResultError, match="ours is wrong for small o_proj, m=3"):
        measure_linear(SMALL, [strict], (3,), "float16", timer, rng)


def test_timer_turns_through_all_copies(timer: Timer) -> None:
    calls = [0, 0, 0]

    def run(i: int) -> None:
        calls[i] += 1

    assert timer.seconds([lambda i=i: run(i) for i in range(3)]) > 0
    assert min(calls) > 0
    assert max(calls) - min(calls) <= 1
    assert timer.copies(2**14) == 4
    assert timer.copies(2**20) == 2
