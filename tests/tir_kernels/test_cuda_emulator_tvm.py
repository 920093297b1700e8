"""TVM on the emulated device: host code, the virtual machine, CUDA graphs, saved modules."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.tir_kernels.cuda_emulator import (
    Launch,
    emulate,
    emulated_cuda,
    load_emulated,
    planned_launches,
    why_not,
)
from tir_kernels._tvm import PrimFunc, T, Target

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TARGET = Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})


def row_sums(threads: int = 64) -> PrimFunc:
    """out[i] = sum of row i of x [m, 4 * threads], or of its negative where m > 3."""

    @T.inline
    def kernel(m: Any, sign: Any, x: Any, out: Any) -> None:
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                parts = T.alloc_buffer((threads,), "float32", scope="shared.dyn")
                total = T.alloc_buffer((1,), "float32", scope="local")
                total[0] = T.float32(0)
                for i in T.serial(4):
                    total[0] = total[0] + T.Cast("float32", x[row, tx * 4 + i])
                parts[tx] = total[0]
                T.tvm_storage_sync("shared")
                if tx == 0:
                    total[0] = T.float32(0)
                    for i in T.serial(threads):
                        total[0] = total[0] + parts[i]
                    out[row] = total[0] * sign

    @T.prim_func(private=True, s_tir=True)
    def sums(x_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, 4 * threads), "float16")
        out = T.match_buffer(out_handle, (m,), "float32")
        if T.tvm_thread_invariant(m > 3):
            kernel(T.Cast("int32", m), T.float32(-1), x, out)
        else:
            kernel(T.Cast("int32", m), T.float32(1), x, out)

    return sums


def random_rows(m: int) -> tuple[np.ndarray, np.ndarray, int]:
    seed = secrets.randbits(32)
    x = np.random.default_rng(seed).standard_normal((m, 256)).astype(np.float16)
    return x, x.astype(np.float64).sum(1) * (-1 if m > 3 else 1), seed


def test_host_code_chooses_the_kernel() -> None:
    kernel = emulate(row_sums(), TARGET)
    for m in (1, 3, 4, 9):
        x, expected, seed = random_rows(m)
        out = np.full(m, np.nan, np.float32)
        kernel(x, out)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4, err_msg=f"seed {seed}")


def test_planned_launches_are_not_made() -> None:
    kernel = emulate(row_sums(), TARGET)
    out = np.full(5, np.nan, np.float32)
    with planned_launches() as launches:
        kernel(random_rows(5)[0], out)
    assert launches == [Launch("main_kernel", (5, 1, 1), (64, 1, 1), 256)]
    assert np.isnan(out).all()


def test_host_code_checks_its_arguments() -> None:
    kernel = emulate(row_sums(), TARGET)
    with pytest.raises(Exception, match=r"shape|256"):
        kernel(np.zeros((2, 255), np.float16), np.zeros(2, np.float32))


def test_device_is_there_only_as_long_as_asked_for() -> None:
    before = tvm.cuda(0).exist
    with emulated_cuda("sm_86"):
        assert tvm.cuda(0).exist
        assert tvm.cuda(0).compute_version == "8.6"
        assert tvm.cuda(0).warp_size == 32
        assert not tvm.cuda(1).exist
    assert tvm.cuda(0).exist == before


def test_source_compiled_without_a_device_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
    module = tvm.IRModule({"main": row_sums().with_attr("global_symbol", "main")})
    with TARGET:
        executable = tvm.compile(module, target=TARGET)
    x, expected, seed = random_rows(5)
    with emulated_cuda():
        load_emulated(executable)
        out = tvm.runtime.empty((5,), "float32", tvm.cuda(0))
        executable["main"](tvm.runtime.tensor(x, tvm.cuda(0)), out)
        np.testing.assert_allclose(
            out.numpy(), expected, rtol=1e-5, atol=1e-4, err_msg=f"seed {seed}"
        )


def _chain(graph: bool) -> Any:
    """forward(x [2, 256]) = the row sums of 16 x, through four calls of a kernel."""

    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((2, 256), "float16"), out: T.Buffer((2, 256), "float16")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for bx in T.thread_binding(2, thread="blockIdx.x"):
            for tx in T.thread_binding(256, thread="threadIdx.x"):
                out[bx, tx] = x[bx, tx] + x[bx, tx]

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 256], "float16"))
    twice, sums = bb.add_func(double, "double"), bb.add_func(row_sums(), "row_sums")
    with bb.function("forward", [x]):
        y: Any = x
        for _ in range(4):
            y = bb.emit(relax.call_tir(twice, [y], relax.TensorType([2, 256], "float16")))
        bb.emit_func_output(bb.emit(relax.call_tir(sums, [y], relax.TensorType([2], "float32"))))
    config = {"relax.backend.use_cuda_graph": graph}
    with TARGET, tvm.transform.PassContext(config=config):
        return tvm.compile(bb.get(), target=TARGET)


@pytest.mark.parametrize("graph", [False, True])
def test_virtual_machine_with_and_without_cuda_graphs(graph: bool) -> None:
    with emulated_cuda():
        executable = _chain(graph)
        assert ("cuda_graph.run_or_capture" in executable.as_text()) == graph
        device = tvm.cuda(0)
        machine = relax.VirtualMachine(executable, device)
        for _ in range(3):  # run once and captured, then replayed twice
            x, expected, seed = random_rows(2)
            out = machine["forward"](tvm.runtime.tensor(x, device)).numpy()
            np.testing.assert_allclose(
                out, 16 * expected, rtol=1e-5, atol=1e-3, err_msg=f"seed {seed}"
            )
