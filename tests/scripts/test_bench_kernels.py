"""scripts/bench_kernels.py without a GPU: its data, its verdicts, and that folders can be run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from cuda_stub import StubMachine, can_be_built
from tvm.libinfo import package_lib_paths

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benchmarks import generic_schedule, measure
from benchmarks.cases import GROUP_SIZE, MODELS, Case, Linear, relative_error
from benchmarks.contenders import Apply, TorchHalf, UnavailableError
from benchmarks.end_to_end import Decoding
from benchmarks.prebuilt import MANIFEST, RUNTIME, Prebuilt, PreparedError, row_class
from benchmarks.report import HALF, OURS, Row, as_json, decoding_line, table, targets, verdicts
from benchmarks.timing import Ceilings, Time

from tir_kernels import reference

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = Linear("small", "o_proj", 256, 48)
SEED = int(np.random.default_rng().integers(2**31))


def test_shapes_are_those_of_the_models() -> None:
    shapes = {(linear.name, linear.K, linear.N) for linear in MODELS["qwen2.5-7b"]}
    assert shapes == {
        ("qkv_proj", 3584, 4608),
        ("o_proj", 3584, 3584),
        ("gate_up_proj", 3584, 37888),
        ("down_proj", 18944, 3584),
    }
    llama = {linear.name: linear for linear in MODELS["llama-3-8b"]}
    assert llama["qkv_proj"].N == 6144
    assert llama["o_proj"].is_large
    # Four bits a weight, four and sixteen a group, activations and results in float16.
    bits = 4096 * 4096 * (4 + 20 / GROUP_SIZE)
    assert llama["o_proj"].bytes_read(3) == bits / 8 + 3 * 2 * 2 * 4096


def test_cases_are_what_the_reference_says() -> None:
    case = Case(SMALL, "cpu", SEED)
    stock = tuple(tensor.numpy() for tensor in case.stock)
    expected = reference.dequantize(*stock)
    assert np.array_equal(case.dense(torch.float64).numpy(), expected), SEED
    for found, wanted in zip(case.tiled, reference.tile(*stock), strict=True):
        assert np.array_equal(found.numpy(), wanted), SEED
    assert not torch.equal(case.activations(2), case.activations(2))


@pytest.mark.parametrize("rows", [1, None])
def test_the_generic_op_computes_the_linear(rows: int | None) -> None:
    function = generic_schedule.linear(SMALL.K, SMALL.N, GROUP_SIZE, rows)
    compiled = tvm.compile(function, target="llvm")
    case = Case(SMALL, "cpu", SEED)
    x = case.activations(rows or 3)
    out = tvm.runtime.empty((x.shape[0], SMALL.N), "float16")
    compiled(*(tvm.runtime.tensor(t.numpy()) for t in (x, *case.stock)), out)
    expected = x.double() @ case.dense(torch.float64)
    assert relative_error(torch.from_numpy(out.numpy()), expected) < 1e-2, SEED


def test_the_generic_schedule_has_a_function_for_every_number_of_rows() -> None:
    assert [row_class(m) for m in (1, 2, 3, 8, 9, 2048)] == [
        *("one", "two", "eight", "eight", "many", "many")
    ]


@dataclass(frozen=True)
class Fake:
    """A contender whose product is off by a factor, or that is not there."""

    name: str
    factor: float | None
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        if self.factor is None:
            raise UnavailableError("pip install it")
        weight = case.dense(torch.float32) * self.factor
        return lambda: lambda x: x.float() @ weight


def test_what_is_wrong_or_missing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def count(runs: list[Callable[[], torch.Tensor]]) -> Time:
        timed.append(len(runs))
        return Time(1e-6)

    monkeypatch.setattr(measure, "measure", count)
    monkeypatch.setattr(measure, "copies_needed", lambda nbytes: 10**6 // nbytes)
    results = measure.Results()
    fakes = [TorchHalf(), Fake("right", 1.0), Fake("off", 1.01), Fake("nan", float("nan"))]
    contenders = [*fakes, Fake("absent", None)]
    for _ in range(2):
        measure.measure_linear(SMALL, contenders, (1, 5), SEED, results, device="cpu")
    assert [set(row.times) for row in results.rows] == [{HALF, "right"}] * 4
    assert results.refused.keys() == {"off, small o_proj", "nan, small o_proj", "absent"}
    assert "1.0e-02" in results.refused["off, small o_proj"]
    # Copies that no cache holds: float16 weights take four times as many bytes.
    weights = SMALL.K * SMALL.N
    once = [10**6 // (2 * weights)] * 2 + [10**6 // (weights // 2)] * 2
    assert timed == 2 * once


CEILINGS = Ceilings(4e12, 8e14)


def rows(ours: float, half: float, generic: float) -> list[Row]:
    """Llama's o_proj at m = 1, 16 and 512, all with these times in seconds."""
    linear = MODELS["llama-3-8b"][1]
    times = {OURS: Time(ours), HALF: Time(half), "mlc_llm": Time(generic, captured=False)}
    return [Row(linear, m, dict(times)) for m in (1, 16, 512)]


def test_targets_that_are_met_and_missed() -> None:
    few = rows(2.5e-6, 9e-6, 2e-5)
    found = targets(few, (HALF, "mlc_llm"), CEILINGS, Decoding(0.0050, 0.0045))
    assert [target.met for target in found] == [True, True, True, True, True]
    # 8.7 MB in 2.5 us of 4 TB/s.
    assert found[0].worst is not None
    assert found[0].worst[0] == pytest.approx(0.873, abs=0.01)
    slow = targets(rows(9e-6, 8e-6, 2e-5), (HALF, "mlc_llm"), CEILINGS, Decoding(0.006, 0.0045))
    assert [target.met for target in slow] == [False, False, False, False, False]
    assert slow[1].worst == (pytest.approx(8 / 9), f"llama-3-8b o_proj m=1 ({HALF})")
    lines = verdicts(slow)
    assert all(line.startswith("MISSED") for line in lines)
    nothing = targets([], (), CEILINGS, None)
    assert {target.met for target in nothing} == {None}
    assert json.loads(json.dumps(as_json(few, CEILINGS, found)))["targets"][0]["met"]


def test_the_table() -> None:
    few = rows(2.5e-6, 9e-6, 2e-5)
    del few[1].times["mlc_llm"]
    head, one, sixteen, many, star = table(few, (OURS, HALF, "absent", "mlc_llm"), CEILINGS)
    assert "absent" not in head
    assert one.split()[4:] == ["1", "2.5", "9.0", "20.0*", "87%", "copy"]
    assert sixteen.split()[7] == "-"
    assert many.endswith("matrix")
    assert star.startswith("*")
    assert "200.0 tokens/s" in decoding_line(Decoding(0.005, 0.004))
    assert "25% overhead" in decoding_line(Decoding(0.005, 0.004))


def test_a_folder_that_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match="--prepare"):
        Prebuilt(tmp_path).function("tiled", "k1_n1")
    (tmp_path / MANIFEST).write_text('{"libraries": {"tiled": []}}')
    with pytest.raises(PreparedError, match="no tiled kernel k1_n1"):
        Prebuilt(tmp_path).function("tiled", "k1_n1")


_RUN = """
import sys
sys.path.insert(0, sys.argv[2])
sys.modules["tvm"] = None
import tvm_ffi
from pathlib import Path
from benchmarks.prebuilt import Prebuilt
prebuilt = Prebuilt(Path(sys.argv[1]))
kernel = prebuilt.function("tiled", "add_one")
allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
shape, gpu = tvm_ffi.Shape([7, 256]), tvm_ffi.device("cuda", 0)
kernel(*(allocate(shape, tvm_ffi.dtype("float16"), gpu, None) for _ in range(2)))
"""


@pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")
def test_a_prepared_folder_runs_without_tvms_python(tmp_path: Path) -> None:
    from cuda_stub.kernels import export

    export(tmp_path / "tiled.so", "sm_90")
    for name in RUNTIME:
        places = (folder / name for folder in package_lib_paths())
        shutil.copy2(next(place for place in places if place.is_file()), tmp_path)
    (tmp_path / MANIFEST).write_text('{"libraries": {"tiled": ["add_one"]}}')
    (tmp_path / "stub").mkdir()
    answer = StubMachine(tmp_path / "stub").run(_RUN, tmp_path, SCRIPTS)
    assert answer.status == 0, answer.output
    (launch,) = answer.named("launch")
    assert launch.name == "add_one_kernel"
    assert launch.numbers[:2] == (7, 256)


@pytest.mark.slow
def test_a_dry_run_compiles_everything() -> None:
    script = str(SCRIPTS / "bench_kernels.py")
    command = [sys.executable, script, "--dry-run", "--target", "cuda:sm_90"]
    done = subprocess.run(
        [*command, "--models", "qwen2.5-0.5b"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tiled.so" in done.stdout
    assert "4864 x 896" in done.stdout
