"""The bytes of every format against those that its own tool made of the same integers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.formats.base import LinearSpec
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight
from tir_kernels import reference

GOLDEN = Path(__file__).parent / "golden"
PEERS = Path(__file__).parents[3] / ".peers"
# The tool's name for a case, without its numbers -> ours.
_FORMATS = {
    "autoawq gemm": "awq",
    "autoawq gemv": "awq-gemv",
    "autoawq gemv_fast": "awq-gemv-fast",
    "llm-awq": "llm-awq",
    "pack-quantized": "compressed-tensors",
    "int-quantized": "compressed-tensors",
}
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="wants compressed-tensors"
)


def _make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _make()


def _golden(tool: str) -> dict[str, dict[str, np.ndarray]]:
    """case -> tensor -> array."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key, array in np.load(GOLDEN / f"{tool}.npz").items():
        case, _, tensor = key.rpartition("/")
        cases.setdefault(case, {})[tensor] = array
    return cases


def _cases() -> list:
    return [
        pytest.param(
            tool,
            case,
            id=case.replace(" ", "-"),
            marks=needs_library if tool == "compressed-tensors" else (),
        )
        for tool in ("autoawq", "llm-awq", "compressed-tensors")
        for case in _golden(tool)
    ]


def _weight(tool: str, case: str) -> tuple[str, QuantizedWeight, LinearSpec]:
    """The format of a case and the integers it was made of."""
    given = dict(np.load(GOLDEN / "integers.npz"))
    kind, *numbers = case.rsplit(" ", 3 if tool == "compressed-tensors" else 1)
    bits, group, symmetric, shape = 4, int(numbers[-1 if len(numbers) == 1 else 1]), False, None
    shape = make.SHAPE
    if tool == "compressed-tensors":
        bits, symmetric, shape = int(numbers[0]), numbers[2] == "symmetric", make.SMALL
    codes, zeros, scales = make.case(given, bits, group, symmetric, shape)
    grid = IntegerGrid(bits, group, symmetric)
    weight = QuantizedWeight(*(torch.from_numpy(a.copy()) for a in (codes, scales, zeros)), grid)
    active = 8 if kind == "int-quantized" else None
    return _FORMATS[kind], weight, LinearSpec(*shape, grid, active)


@pytest.mark.parametrize(("tool", "case"), _cases())
def test_bytes_are_the_tools_own(tool: str, case: str) -> None:
    name, weight, spec = _weight(tool, case)
    found = FORMATS[name].tensors("layer", weight, spec)
    expected = _golden(tool)[case]
    assert set(found) == {f"layer.{key}" for key in expected}
    for key, array in expected.items():
        tensor = found[f"layer.{key}"].numpy()
        assert tensor.dtype == array.dtype
        assert tensor.shape == array.shape
        assert tensor.tobytes() == array.tobytes(), key
    assert FORMATS[name].bytes_of(spec) == sum(array.nbytes for array in expected.values())


@pytest.mark.parametrize(("tool", "case"), _cases())
def test_the_tools_bytes_are_read(tool: str, case: str) -> None:
    name, weight, spec = _weight(tool, case)
    stored = {f"layer.{key}": torch.from_numpy(a) for key, a in _golden(tool)[case].items()}
    found = FORMATS[name].read("layer", spec, stored.__getitem__)
    for part in ("codes", "scale", "zero"):
        assert getattr(found, part).dtype == getattr(weight, part).dtype
        assert torch.equal(getattr(found, part), getattr(weight, part)), part


def test_gemm_words_are_those_of_the_reference() -> None:
    codes = torch.randint(0, 16, (7, 24), dtype=torch.uint8)
    grid = IntegerGrid(4, 7)
    ones = torch.ones(1, 24)
    weight = QuantizedWeight(codes, ones.half(), ones.to(torch.uint8), grid)
    found = FORMATS["awq"].tensors("layer", weight, LinearSpec(7, 24, grid))
    assert np.array_equal(found["layer.qweight"].numpy(), reference.pack(codes.numpy()))


@pytest.mark.peers
@pytest.mark.parametrize("tool", ["autoawq", "llm-awq", "compressed-tensors"])
def test_golden_files_can_be_made_again(tool: str, tmp_path: Path) -> None:
    """MLCAWQ_LLM_AWQ names a checkout of mit-han-lab/llm-awq."""
    python, rest = PEERS / {"autoawq": "autoawq"}.get(tool, "llmcompressor") / "bin/python", []
    if tool == "llm-awq":
        checkout = os.environ.get("MLCAWQ_LLM_AWQ")
        if not checkout:
            pytest.skip("MLCAWQ_LLM_AWQ does not name a checkout of llm-awq")
        python, rest = Path(sys.executable), [checkout]
    if not python.is_file():
        pytest.skip(f"no environment of {tool}")
    out = tmp_path / "made.npz"
    command = [python, GOLDEN / "make.py", tool, GOLDEN / "integers.npz", out, *rest]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    made, golden = np.load(out), np.load(GOLDEN / f"{tool}.npz")
    assert set(made) == set(golden)
    for key in golden:
        assert made[key].tobytes() == golden[key].tobytes(), key
