"""Numbers that overflow, memory that runs out, files that are not what was computed: one message
or a warning each, and nothing is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from small_block import SmallBlock, make_block, quantized
from tiny_models import make_tiny_model, make_tokenizer
from torch import nn

from mlcawq.errors import UserError
from mlcawq.quantize import budget, quantization
from mlcawq.quantize.calibration import BUNDLED, CalibrationData, load_calibration
from mlcawq.quantize.guards import NotFiniteError, quantize_guarded, simpler
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.pipeline import quantize_checkpoint
from mlcawq.quantize.progress import Silent
from mlcawq.quantize.recipe import Recipe, parse_recipe
from mlcawq.quantize.shortage import is_memory_short, shortage_told


@pytest.fixture(scope="module")
def calibration() -> CalibrationData:
    return load_calibration(BUNDLED, make_tokenizer(), samples=6, seq_len=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards") / "model"
    return make_tiny_model(folder, hidden=64, intermediate=64, outliers=10.0)


def _recipe(**options: Any) -> Recipe:
    return parse_recipe({"group_size": 32, "scale": None, "clip": None, **options})


def _weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def _with_a_huge_input() -> SmallBlock:
    """The square of a channel that counts for nothing overflows."""
    block = make_block()
    block.norm.weight[1] = 1e25
    block.up.weight[:, 1] = 0
    return block


def test_inputs_that_overflow_when_squared_keep_their_ranges() -> None:
    result = quantized({}, _with_a_huge_input())
    assert result.warnings == ("up: its inputs overflow when squared; full ranges are kept",)
    assert result.error < 0.1


def test_inputs_that_overflow_when_squared_are_rounded_to_nearest() -> None:
    options: dict[str, Any] = {"scale": None, "clip": None}
    nearest = quantized(options, _with_a_huge_input())
    options["compensation"] = {"towards_original": 0}
    result = quantized(options, _with_a_huge_input())
    assert result.warnings == ("up: inputs overflow when squared; rounded to nearest",)
    assert torch.equal(result.weights["up"].codes, nearest.weights["up"].codes)
    assert not torch.equal(result.weights["down"].codes, nearest.weights["down"].codes)


def test_a_block_that_overflows_is_done_again_with_less() -> None:
    recipe = parse_recipe({"compensation": {}})
    tried: list[Recipe] = []

    def quantize(block: nn.Module, recipe: Recipe) -> str:
        tried.append(recipe)
        if recipe.scale is not None:
            raise NotFiniteError.one("NaN", "block")
        return "done"

    blocks = [nn.Identity() for _ in range(3)]
    again = iter(blocks[1:])
    block, result, warnings = quantize_guarded(
        blocks[0], lambda: next(again), recipe, quantize, "block"
    )
    assert block is blocks[2]
    assert result == "done"
    assert [bool(tried_one.compensation) for tried_one in tried] == [True, False, False]
    assert len(warnings) == 2
    assert "without scales" in warnings[1]
    assert tried[-1] == list(simpler(recipe))[1][1]


def test_a_block_that_nothing_helps_is_named() -> None:
    def quantize(block: nn.Module, recipe: Recipe) -> None:
        raise NotFiniteError.one("NaN", "model.layers.3")

    with pytest.raises(UserError, match=r"--keep 'model\.layers\.3'"):
        quantize_guarded(nn.Identity(), nn.Identity, _recipe(), quantize, "model.layers.3")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_has_many_names(error: Exception) -> None:
    assert is_memory_short(error)
    with pytest.raises(UserError, match="--max-memory"), shortage_told(Path("out")):
        raise error


def test_what_is_no_shortage_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), shortage_told(Path("out")):
        raise RuntimeError("shapes do not fit")


def test_out_of_memory_half_way_keeps_the_finished_blocks(
    tmp_path: Path, source: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hidden states in files, in smaller batches, lead to what memory leads to."""
    report = quantize_checkpoint(source, tmp_path / "whole", _recipe(), calibration)
    # Random weights make nothing of any text, like a model with another one's tokenizer.
    assert "better than guessing" in " ".join(report.warnings)
    real, calls = quantization.quantize_block, []

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(budget, "_ways", lambda _: iter([(2048, True, 2**26)]))
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "quantize_block", short)
        with pytest.raises(UserError, match="the finished blocks are kept"):
            quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)

    class Watch(Silent):
        def started(self, blocks: int, finished: int) -> None:
            assert finished == 1

    quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration, progress=Watch())
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_written_is_read_again(
    tmp_path: Path, source: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that changed on its way to the disk, and a norm that did."""
    real = Journal.block_tensors
    for name, match in (
        ("mlp.up_proj.scales", r"layers\.1\.mlp\.up_proj\.weight: what was written is not"),
        ("input_layernorm.weight", "KL divergence"),
    ):

        def damaged(journal: Journal, i: int, name: str = name) -> dict[str, torch.Tensor]:
            tensors = real(journal, i)
            for key in tensors:
                if key.endswith(f"layers.1.{name}"):
                    tensors[key] = tensors[key] * 30
            return tensors

        recipe = _recipe(scale={"tokens": 16, "grid": 4})
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "block_tensors", damaged)
            with pytest.raises(UserError, match=match):
                quantize_checkpoint(source, tmp_path / "out", recipe, calibration)
        assert not (tmp_path / "out").exists()
    quantize_checkpoint(source, tmp_path / "out", recipe, calibration)
    assert (tmp_path / "out").exists()


def test_budgets_name_what_is_too_little(
    tmp_path: Path, source: Path, calibration: CalibrationData
) -> None:
    with pytest.raises(UserError, match=r"--max-memory 1\.0 MB: at least about"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration, max_memory=10**6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("1.5 gib", 3 * 2**29), ("500m", 5 * 10**8), ("1024", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert budget.parse_bytes(text, "--max-memory") == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "0", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--max-memory"):
        budget.parse_bytes(text, "--max-memory")
