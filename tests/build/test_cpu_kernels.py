"""Kernels of several variants in one library: generated once where that is enough, all correct."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import tirx as T  # noqa: N812

from mlcawq.build import cpu_kernels
from mlcawq.build.cpu_kernels import generate_kernels
from mlcawq.build.cpu_library import CpuLibrary
from mlcawq.build.cpu_target import Variant, level_target
from mlcawq.build.link import Tools
from mlcawq.engine.cpu_library import LEVEL_VARIABLE
from mlcawq.engine.processor import this_processor
from mlcawq.graph.pipeline import lower_module
from mlcawq.graph.settings import CompileSettings
from tir_kernels._tvm import IRModule, PrimFunc, target_has_features

LEVELS = {level.name: level for level in this_processor().levels}
WANTED = ("x86-64-v2", "x86-64-v3", "avxvnni")
pytestmark = pytest.mark.skipif(
    not set(WANTED) <= set(LEVELS), reason=f"kernels are run for {', '.join(WANTED)}"
)
SIZE = 40


def times(factor: float, scheduled: bool) -> PrimFunc:
    """out = factor x, in float16."""

    @T.prim_func(private=True, s_tir=True)
    def multiply(x: T.Buffer((SIZE,), "float16"), out: T.Buffer((SIZE,), "float16")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for i in T.parallel(5):
            for j in T.vectorized(8):
                out[i * 8 + j] = T.Cast(
                    "float16", T.Cast("float32", x[i * 8 + j]) * T.float32(factor)
                )

    return multiply.with_attr("tirx.is_scheduled", True) if scheduled else multiply


def module_for(variant: Variant) -> IRModule:
    """x * 2, * 3, * (5, 7 or 11, by features), rounded to float16 after each."""
    vnni = target_has_features("avxvnni", variant.target)
    avx2 = target_has_features("avx2", variant.target)
    kernels = {
        "unscheduled": times(2, scheduled=False),
        "scheduled": times(3, scheduled=True),
        "special": times(11 if vnni else 7 if avx2 else 5, scheduled=True),
    }
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((SIZE,), "float16"))
    with bb.function("main", [x]):
        with bb.dataflow():
            value = x
            for name, kernel in kernels.items():
                variable = bb.add_func(kernel, name)
                out = relax.TensorType((SIZE,), "float16")
                value = bb.emit(relax.call_tir(variable, [value], out_ty=out))
            result = bb.emit_output(value)
        bb.emit_func_output(result)
    return lower_module(bb.finalize(), CompileSettings(64, 64, 1), variant.target, {})


def variants(*names: str) -> list[Variant]:
    return [Variant(name, level_target(LEVELS[name]), LEVELS[name].features) for name in names]


def test_variants_share_what_is_the_same_and_as_good(tmp_path: Path) -> None:
    said: list[str] = []
    made = generate_kernels(variants(*WANTED), module_for, tmp_path, said.append)
    assert said == ["code"]
    low, v3, vnni = (variant.kernels for variant in made.provided)
    assert low["unscheduled"] == v3["unscheduled"] == vnni["unscheduled"]
    assert low["scheduled"] != v3["scheduled"] == vnni["scheduled"]
    assert len({low["special"], v3["special"], vnni["special"]}) == 3
    assert all(path.is_file() for path in made.objects)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_each_variant_runs_its_own(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    chosen = variants(*WANTED)
    made = generate_kernels(chosen, module_for, tmp_path, lambda _: None)
    path = tmp_path / "out" / "lib-cpu.so"
    path.parent.mkdir()
    Tools(compiler).link(CpuLibrary(made, chosen[0].target, tmp_path), path)
    x = np.random.default_rng().standard_normal(SIZE).astype(np.float16)
    x[:4] = (0, 65504, 6e-8, -6e-5)  # the largest, a subnormal
    for name, factor in zip(WANTED, (5, 7, 11), strict=True):
        monkeypatch.setenv(LEVEL_VARIABLE, name)
        copy = shutil.copy(path, path.with_name(f"{name}.so"))
        vm = relax.VirtualMachine(tvm.runtime.load_module(copy), tvm.cpu())
        with np.errstate(over="ignore"):
            expected = x
            for step in (2, 3, factor):
                expected = (expected.astype(np.float32) * np.float32(step)).astype(np.float16)
        np.testing.assert_array_equal(vm["main"](tvm.runtime.tensor(x)).numpy(), expected)


def test_graphs_that_differ_are_not_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(variant: Variant) -> IRModule:
        bb = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((len(variant.features),), "float16"))
        with bb.function("main", [x]):
            bb.emit_func_output(x)
        return lower_module(bb.finalize(), CompileSettings(64, 64, 1), variant.target, {})

    monkeypatch.setattr(cpu_kernels, "_generate", lambda *_: tmp_path)
    with pytest.raises(RuntimeError, match="graph for x86-64-v3 is not"):
        generate_kernels(variants("x86-64-v2", "x86-64-v3"), lower, tmp_path, lambda _: None)
