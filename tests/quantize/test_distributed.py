"""Two processes take the same decisions as one, and end together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from small_block import WIDTH, quantized
from tiny_models import make_tiny_model

from mlcawq.errors import UserError
from mlcawq.quantize import distributed, parallel
from mlcawq.quantize.block import BlockResult
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.states import HiddenStates


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _as_rank(rank: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    parallel._pool.cache_clear()  # threads do not outlive a fork
    with distributed.session():
        work(*arguments)


def _on_two(work: Callable[..., Any], *arguments: Any) -> None:
    """`work` in two processes; forked, since importing torch twice more takes seconds."""
    torch.multiprocessing.start_processes(
        _as_rank, (_free_port(), work, arguments), nprocs=2, start_method="fork"
    )


_RECIPES: list[dict[str, Any]] = [
    {"scale": {"tokens": 16}},
    {"scale": {"tokens": 16}, "compensation": {"towards_original": 0.5}},
    {"scale": {"tokens": 16}, "learning": {"iterations": 5, "batch": 2, "hold_back": 3}},
]


def _summary(result: BlockResult, file: Path) -> dict[str, torch.Tensor]:
    found = {f"{name}.codes": weight.codes for name, weight in result.weights.items()}
    found |= {f"{name}.scale": weight.scale for name, weight in result.weights.items()}
    assert isinstance(result.outputs, HiddenStates)
    result.outputs.save(file)
    found["errors"] = torch.tensor([result.error, *(linear.found for linear in result.linears)])
    return found | result.changed


def _quantize_share(folder: Path) -> None:
    for i, options in enumerate(_RECIPES):
        found = _summary(quantized(options), folder / f"{i}.f32")
        torch.save(found, folder / f"{i}.{distributed.rank()}.pt")


def test_two_ranks_quantize_a_block_as_one_does(tmp_path: Path) -> None:
    _on_two(_quantize_share, tmp_path)
    for i, options in enumerate(_RECIPES):
        expected = _summary(quantized(options), tmp_path / "alone.f32")
        assert {"norm.weight", "up.codes"} <= set(expected)  # a scale was found
        first, second = (torch.load(tmp_path / f"{i}.{rank}.pt") for rank in (0, 1))
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            if name.endswith("codes"):
                assert (first[name] != value).float().mean() < 0.01, name
            else:
                torch.testing.assert_close(first[name], value, rtol=2e-3, atol=1e-5)
        # The first rank has saved both ranks' rows, in the order of one process.
        both, alone = (
            torch.from_file(str(tmp_path / name), size=41 * WIDTH)
            for name in (f"{i}.f32", "alone.f32")
        )
        assert (both - alone).norm() < 0.01 * alone.norm()


def _raise_on_second(folder: Path) -> None:
    def check() -> None:
        if distributed.rank() == 1:
            raise UserError.one("only here")

    try:
        distributed.everywhere(check)
    except UserError as error:
        (folder / f"{distributed.rank()}.txt").write_text(str(error))
    with Journal(folder / "out", {}) as journal:
        states = HiddenStates([(1, 3)], 4, torch.device("cpu"), journal.folder)
        states[0] = torch.full((1, 3, 4), float(distributed.rank()))
        journal.commit({}, {"h": states}, {"block": 0})
        again = states.like()
        journal.load({"h": again})
        assert (again[0] == distributed.rank()).all()
        assert journal.finished == 1


def test_problems_and_the_journal_are_shared(tmp_path: Path) -> None:
    _on_two(_raise_on_second, tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["only here"] * 2
    with Journal(tmp_path / "out", {}) as journal:  # one process goes on with what two have left
        states = HiddenStates([(2, 3)], 4, torch.device("cpu"))
        journal.load({"h": states})
        assert states[0][:, 0, 0].tolist() == [0, 1]
        journal.discard()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["awq", "awq+gptq"])
def test_torchrun_writes_what_one_process_writes(tmp_path: Path, recipe: str) -> None:
    source = make_tiny_model(tmp_path / "model", outliers=30.0)
    start = [sys.executable, "-m"]
    end = ["mlcawq", "quantize", str(source), "--recipe", recipe, "--group-size", "64"]
    end += ["--calib-samples", "7", "--calib-seq-len", "64"]
    subprocess.run([*start, *end, "-o", str(tmp_path / "one")], check=True)
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
    subprocess.run([*start, *torchrun, *end, "-o", str(tmp_path / "two")], check=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith(".scales") or "norm" in name:
            torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


@pytest.mark.slow
def test_an_error_on_one_rank_is_told_once(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", vocab_size=100)  # fewer than the tokenizer has
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["mlcawq", "quantize", str(source), "-o", str(tmp_path / "out")]
    command += ["--group-size", "64", "--calib-samples", "4", "--calib-seq-len", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("the model knows 100 tokens") == 1


def test_alone_nothing_is_shared() -> None:
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    tensor = torch.ones(2)
    distributed.sum_(tensor)
    assert tensor.tolist() == [1, 1]
    assert distributed.total(2.5) == 2.5
    assert distributed.before(7) == 0
