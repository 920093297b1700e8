"""The choice of experts, as it is given to mlc_llm: compiled and run without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax
from tvm.relax.frontend import nn
from tvm.script import tirx as T  # noqa: N812
from tvm.target import Target

from mlcawq.build.mlc_plugin.routing import get_indptr, serial_threads, start_top_k

EXPERTS = 5
PLAIN = {"param_mode": "none", "effect_mode": "none"}


class FirstRows(nn.Module):
    def __init__(self, inclusive: bool, dtype: str) -> None:
        self.inclusive = inclusive
        self.dtype = dtype

    def forward(self, mask: nn.Tensor) -> nn.Tensor:
        tokens = mask.shape[1]
        sums = nn.op.reshape(mask, (EXPERTS * tokens,))
        return get_indptr(sums, EXPERTS, tokens, self.inclusive, self.dtype)


@pytest.mark.parametrize(("inclusive", "dtype"), [(False, "int32"), (True, "int64")])
def test_first_rows_of_experts(inclusive: bool, dtype: str) -> None:
    sums_type = nn.spec.Tensor([EXPERTS, "tokens"], "int32")
    module, _ = FirstRows(inclusive, dtype).export_tvm(
        spec={"forward": {"mask": sums_type, "$": PLAIN}}
    )
    machine = relax.VirtualMachine(relax.build(module, target=Target("llvm")), tvm.cpu())
    random = np.random.default_rng(0)
    for tokens in (1, 2, 17):
        goes = random.integers(0, 2, (EXPERTS, tokens))
        sums = goes.cumsum().astype(np.int32).reshape(EXPERTS, tokens)
        found = machine["forward"](tvm.runtime.tensor(sums)).numpy()
        expected = np.concatenate([[] if inclusive else [0], goes.sum(axis=1).cumsum()])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


def top_two(start: Any) -> Any:
    """Indices of the two largest of each row, by a thread for each, as mlc_llm chooses experts."""

    @T.prim_func(private=True, s_tir=True)
    def choose(x_handle: T.handle, out_handle: T.handle) -> None:
        n = T.int32()
        x = T.match_buffer(x_handle, (n, EXPERTS), "float32")
        out = T.match_buffer(out_handle, (n, 2), "int32")
        values = T.sblock_alloc_buffer((2,), "float32", scope="local")
        indices = T.sblock_alloc_buffer((2,), "int32", scope="local")
        for block in T.thread_binding((n + 3) // 4, thread="blockIdx.x"):
            for thread in T.thread_binding(4, thread="threadIdx.x"):
                with T.sblock("choose"):
                    row = T.axis.spatial(n, block * 4 + thread)
                    T.where(block * 4 + thread < n)
                    with T.sblock("start"):
                        start(2, "float32", values, indices)
                    for e in range(EXPERTS):
                        with T.sblock("update"):
                            v = T.axis.spatial(EXPERTS, e)
                            if x[row, v] > values[0]:
                                values[1] = values[0]
                                indices[1] = indices[0]
                                values[0] = x[row, v]
                                indices[0] = v
                            else:
                                if x[row, v] > values[1]:
                                    values[1] = x[row, v]
                                    indices[1] = v
                    for j in T.unroll(2):
                        with T.sblock("out"):
                            k = T.axis.spatial(2, j)
                            out[row, k] = indices[k]

    return choose


def test_threads_of_a_kernel_run_as_loops_on_a_processor() -> None:
    function = top_two(start_top_k).with_attr("global_symbol", "main")
    module = serial_threads(IRModule({"main": function}))
    assert "thread_binding" not in module.script()
    choose = tvm.compile(module, target=Target("llvm"))["main"]
    x = np.random.default_rng(0).standard_normal((6, EXPERTS)).astype(np.float32)
    out = tvm.runtime.tensor(np.full((6, 2), -7, np.int32))
    choose(tvm.runtime.tensor(x), out)
    np.testing.assert_array_equal(out.numpy(), np.argsort(-x, axis=1)[:, :2])


def test_scores_that_are_not_numbers_still_choose_experts() -> None:
    module = serial_threads(
        IRModule({"main": top_two(start_top_k).with_attr("global_symbol", "main")})
    )
    choose = tvm.compile(module, target=Target("llvm"))["main"]
    out = tvm.runtime.tensor(np.full((1, 2), -7, np.int32))
    choose(tvm.runtime.tensor(np.full((1, EXPERTS), np.nan, np.float32)), out)
    assert set(out.numpy()[0]) == {0, 1}
