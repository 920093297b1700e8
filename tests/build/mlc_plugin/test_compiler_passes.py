"""What the plug-in puts in the place of code that was written for another TVM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache
from tvm.script import tirx as T  # noqa: N812

from mlcawq.build.mlc_plugin import kv_cache
from mlcawq.build.mlc_plugin.compiler_passes import LiftGlobalBuffers
from tir_kernels._tvm import Target


@T.prim_func(private=True, s_tir=True)
def twice_plus(x_handle: T.handle, added: T.int64, out_handle: T.handle):
    """out [n, 4] = 2 x [n, 4] + added, by way of a buffer of its own."""
    n = T.int64()
    x = T.match_buffer(x_handle, (n, 4), "float32")
    out = T.match_buffer(out_handle, (n, 4), "float32")
    between = T.sblock_alloc_buffer((n, 4), "float32")
    for i, j in T.grid(n, 4):
        with T.sblock("double"):
            vi, vj = T.axis.remap("SS", [i, j])
            between[vi, vj] = x[vi, vj] * T.float32(2)
    for i, j in T.grid(n, 4):
        with T.sblock("add"):
            vi, vj = T.axis.remap("SS", [i, j])
            out[vi, vj] = between[vi, vj] + T.Cast("float32", added)


def module_of_calls() -> tvm.IRModule:
    """forward(x [m, 4]) = 2 (2 x + m) + m."""
    bb = relax.BlockBuilder()
    m = tvm.tirx.Var("m", "int64")
    x = relax.Var("x", relax.TensorType([m, 4], "float32"))
    function = bb.add_func(twice_plus, "twice_plus")
    with bb.function("forward", [x]):
        with bb.dataflow():
            y: Any = x
            for _ in range(2):
                y = bb.emit(relax.call_tir(function, [y, m], relax.TensorType([m, 4], "float32")))
            y = bb.emit_output(y)
        bb.emit_func_output(y)
    return bb.finalize()


def test_global_buffers_become_outputs() -> None:
    module = LiftGlobalBuffers()(module_of_calls())
    (name,) = [name for name in module.get_global_vars() if name.name_hint != "forward"]
    function = module[name]
    assert len(function.params) == 4
    assert not function.body.block.alloc_buffers
    executable = tvm.compile(module, target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = machine["forward"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_array_equal(got, 2 * (2 * x + 3) + 3)


def test_functions_without_such_buffers_stay_as_they_are() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 4], "float32"))
    with bb.function("forward", [x]):
        with bb.dataflow():
            y = bb.emit_output(bb.emit(relax.op.nn.relu(x)))
        bb.emit_func_output(y)
    module = relax.transform.LegalizeOps()(bb.finalize())
    tvm.ir.assert_structural_equal(LiftGlobalBuffers()(module), module)


@pytest.mark.parametrize(
    ("target", "ours"),
    [
        (Target({"kind": "webgpu"}), True),
        (Target({"kind": "cuda", "arch": "sm_80"}), True),
        (Target({"kind": "metal"}), False),
    ],
)
def test_attention_is_merged_by_our_kernel(
    monkeypatch: pytest.MonkeyPatch, target: Target, ours: bool
) -> None:
    theirs = tvm_kv_cache._merge_state_inplace
    monkeypatch.setattr(tvm_kv_cache, "_merge_state_inplace", theirs)  # put back afterwards
    kv_cache.install()
    merge = tvm_kv_cache._merge_state_inplace(4, 64, "float16", target, "merge")
    assert merge.attrs["global_symbol"] == "merge"
    # Ours waits for all threads of a row between reading and writing.
    assert ("storage_sync" in merge.script()) == ours
