"""What is said to be needed is what is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model, make_tokenizer

from mlcawq.checkpoint.outline import Outline
from mlcawq.quantize.budget import Needs, fitting
from mlcawq.quantize.calibration import BUNDLED, load_calibration
from mlcawq.quantize.recipe import load_recipe

_MEASURED = """
import sys
from pathlib import Path
from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.quantize.calibration import load_calibration
from mlcawq.quantize.pipeline import quantize_checkpoint
from mlcawq.quantize.progress import Silent
from mlcawq.quantize.recipe import load_recipe

class Watch(Silent):
    def planned(self, needs):
        print(needs.memory)
        Path("/proc/self/clear_refs").write_text("5")

source, out, recipe = sys.argv[1:]
text = load_calibration("bundled", load_tokenizer(Path(source)), samples=8, seq_len=512)
report = quantize_checkpoint(
    Path(source), Path(out), load_recipe(recipe, {"group_size": 64}), text, progress=Watch()
)
print(report.run.total.peak_memory)
"""


def _needs(source: Path, recipe: str, limit: int, seq_len: int = 64) -> Needs:
    data = load_calibration(BUNDLED, make_tokenizer(), samples=64, seq_len=seq_len)
    return fitting(Outline(source), load_recipe(recipe, {"group_size": 64}), 10**6, data, limit)


def test_less_memory_means_files_and_then_smaller_batches(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    ways = [_needs(source, "awq", limit) for limit in (10**12, 0)]
    assert [needs.on_disk for needs in ways] == [False, True]
    assert ways[0].batch_tokens == 2048
    assert ways[1].batch_tokens == 64  # one sequence
    assert ways[1].memory < ways[0].memory
    assert ways[1].disk > ways[0].disk
    between = _needs(source, "awq", (ways[0].memory + ways[1].memory) // 2)
    assert ways[1].memory <= between.memory < ways[0].memory


def test_what_a_recipe_does_costs_memory(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", hidden=256, intermediate=8192, layers=1)
    nearest, compensated = (_needs(source, recipe, 10**12).memory for recipe in ("rtn", "awq+gptq"))
    assert compensated > nearest + 2 * 4 * 8192**2  # matrices of channels by channels


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through /proc")
@pytest.mark.parametrize("recipe", ["rtn", "awq", "awq+gptq"])
@pytest.mark.parametrize("width", [512, 1024])
def test_the_estimate_is_not_below_the_peak_and_not_far_above(
    tmp_path: Path, recipe: str, width: int
) -> None:
    source = make_tiny_model(
        tmp_path / "model", hidden=width, intermediate=2816, heads=8, kv_heads=8, dtype="bfloat16"
    )
    command = [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "out"), recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    estimated, peak = map(int, done.stdout.split())
    assert peak <= estimated <= 1.35 * peak
