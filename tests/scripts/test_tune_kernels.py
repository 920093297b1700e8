"""scripts/tune_kernels.py without a GPU: what it tries, what it measures, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mlcawq.build.nvrtc import find_nvrtc
from tir_kernels.cuda import schedule as cuda_schedule
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import ROW_LIMITS, tiled_few_rows_schedule
from tir_kernels.cuda.many_rows_entry import w4a16_problem
from tir_kernels.cuda.many_rows_schedule import MANY_ROW_LIMITS, MORE, many_rows_schedule
from tir_kernels.layouts import TILED, LinearShape

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import tune_kernels
from benchmarks import rounds
from benchmarks.cases import GROUP_SIZE, Case, Linear
from benchmarks.prebuilt import MANIFEST, Prebuilt
from benchmarks.rounds import JUDGED, Contest, Outcome, contests_of, hold
from benchmarks.timing import Time
from benchmarks.tuning import prepare_contests

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = Linear("small", "o_proj", 256, 128)


def test_judged_are_the_kernels_that_there_are() -> None:
    assert list(JUDGED) == [*map(str, (*ROW_LIMITS, *MANY_ROW_LIMITS)), MORE]
    smallest = 1
    for limit, rows in JUDGED.items():
        largest = int(limit) if limit != MORE else 10**6
        assert all(smallest <= m <= largest for m in rows), limit
        smallest = largest + 1


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py"])
    with pytest.raises(SystemExit, match=r"no GPU(.|\n)*--dry-run"):
        tune_kernels.main()
    assert not capsys.readouterr().out


@dataclass
class MadeUp(Prebuilt):
    """Functions that multiply right or wrong, on the CPU."""

    case: Case | None = None

    def function(self, library: str, name: str) -> Any:
        def multiply(x: torch.Tensor, *arguments: torch.Tensor) -> None:
            assert self.case is not None
            arguments[-1][:] = x.float() @ self.case.dense(torch.float32)
            if "wrong" in name:
                arguments[-1][0, 0] += 1000

        return multiply


def test_the_fastest_that_is_right_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made_up = MadeUp(tmp_path)
    times = iter([3.0, 3.0, 2.0, 2.0])

    def case_of(linear: Linear, device: str, seed: int) -> Case:
        made_up.case = Case(linear, "cpu", seed)
        return made_up.case

    def measure(runs: Sequence[Callable[[], torch.Tensor]]) -> Time:
        assert len(runs) == 2
        return Time(next(times))

    monkeypatch.setattr(rounds, "Case", case_of)
    monkeypatch.setattr(rounds, "copies_needed", lambda nbytes: 2)
    monkeypatch.setattr(rounds, "measure", measure)
    schedules = {"rule": {"stages": 3}, "wrong": {"stages": 4}, "best": {"stages": 5}}
    contest = Contest("a", SMALL, "64", "many_rows", "key", schedules)
    outcome = hold(made_up, contest, seed=1)
    assert outcome == Outcome(contest, {"stages": 5}, pytest.approx(2.0), pytest.approx(1.5), 1)

    with pytest.raises(ArithmeticError, match="no schedule"):
        hold(made_up, Contest("a", SMALL, "64", "many_rows", "key", {"wrong": {}}), seed=1)


def test_what_is_written_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = LinearShape(SMALL.K, SMALL.N, GROUP_SIZE)
    problem = w4a16_problem(shape, "float16", Epilogue(SMALL.N, "float16"), TILED)
    few = {**vars(tiled_few_rows_schedule(90, shape, 8)), "warps": 1}
    many = {**vars(many_rows_schedule(90, problem, 64)), "stages": 3}
    path = tmp_path / "schedules.json"
    other = {"sm_80": {"many_rows": {"n16k64,1,2,3,32": {"stages": 2}}}}
    path.write_text(json.dumps(other))
    outcomes = [
        Outcome(Contest("a", SMALL, limit, kernel, key, {}), fields, 1.0, 1.0, 0)
        for limit, kernel, key, fields in (
            ("8", "few_rows", "256,128,128,8", few),
            ("64", "many_rows", problem.key(64), many),
        )
    ]
    tune_kernels.save(path, "sm_90", outcomes)
    written = json.loads(path.read_text())
    assert written["sm_80"] == other["sm_80"]
    monkeypatch.setattr(cuda_schedule, "_measured", lambda: written)
    assert vars(tiled_few_rows_schedule(90, shape, 8)) == few
    assert vars(many_rows_schedule(90, problem, 64)) == many
    before = path.read_text()
    tune_kernels.save(path, "sm_90", outcomes)
    assert path.read_text() == before


@pytest.mark.skipif(find_nvrtc()[0] is None, reason=str(find_nvrtc()[1]))
def test_contests_are_compiled(tmp_path: Path) -> None:
    said: list[str] = []
    made = prepare_contests(tmp_path, "cuda:sm_80", [SMALL], ["8", "32"], 2, said.append)
    assert [contest.kernel for contest in made] == ["few_rows", "many_rows"]
    assert len(said) == 2
    for contest in made:
        assert (tmp_path / f"{contest.name}.so").is_file()
        assert len(contest.schedules) == 2
    assert contests_of(Prebuilt(tmp_path)) == made
    assert json.loads((tmp_path / MANIFEST).read_text())["arch"] == "sm_80"


@pytest.mark.slow
def test_a_dry_run_lists_schedules() -> None:
    command = [sys.executable, str(SCRIPTS / "tune_kernels.py"), "--dry-run", "--most", "1"]
    command += ["--target", "cuda:sm_90", "--models", "qwen2.5-0.5b", "--limits", "1", "more"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "many_rows n16k64,4864,896,128,more, judged at m = 128, 512, 2048" in done.stdout
