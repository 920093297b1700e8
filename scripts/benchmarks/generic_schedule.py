"""The same linear as mlc_llm compiles it: a TE expression, under TVM's generic GPU schedules.

mlc_llm has no schedule for AWQ's layout. Its linear is dequantization to float16 in the transposed
layout and a matrix product that sums in float16; its passes fuse the two and leave the rest to
dlight: by rule order for one row, as low-batch GEMV for up to 2 and up to 8 rows, as a tensor-core
matrix product beyond (mlc_llm: quantization/awq_quantization.py,
compiler_pass/low_batch_specialization.py, compiler_pass/pipeline.py).
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import te, tirx
from tvm.s_tir import dlight
from tvm.target import Target

from tir_kernels.layouts import PACK, column_shift


def linear(K: int, N: int, group_size: int, rows: int | None) -> tirx.PrimFunc:
    """(x [m, K], qweight, qzeros, scales, out [m, N]) in the stock layout, not scheduled.

    rows: the value of m; None: symbolic.
    """
    m = tirx.Var("m", "int64") if rows is None else tirx.IntImm("int64", rows)
    K, N, G = (tirx.IntImm("int64", size) for size in (K, N, group_size))
    x = te.placeholder((m, K), "float16", "x")
    qweight = te.placeholder((K, N // PACK), "int32", "qweight")
    qzeros = te.placeholder((K // G, N // PACK), "int32", "qzeros")
    scales = te.placeholder((K // G, N), "float16", "scales")

    def nibble(words: Any, row: Any, column: Any) -> Any:
        word = words[row, column // PACK]
        value = tirx.bitwise_and(word >> tirx.Cast("int32", column_shift(column % PACK)), 15)
        return tirx.Cast("float16", value)

    weight = te.compute(
        (N, K),
        lambda n, k: (nibble(qweight, k, n) - nibble(qzeros, k // G, n)) * scales[k // G, n],
        "dequantize",
    )
    k = te.reduce_axis((0, K), "k")
    out = te.compute((m, N), lambda i, j: te.sum(x[i, k] * weight[j, k], k), "NT_matmul")
    return te.create_prim_func([x, qweight, qzeros, scales, out])


def scheduled(K: int, N: int, group_size: int, name: str, target: Any) -> tirx.PrimFunc:
    """The function of `prebuilt.CLASSES` called `name`, as dlight schedules it for `target`."""
    plain = target.export()
    if "arch" in plain:
        # dlight knows tensor cores by a number: sm_90a would go without.
        plain = {**plain, "arch": str(plain["arch"]).rstrip("a")}
    gpu = dlight.gpu
    rules = {
        "one": (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()),
        "two": (gpu.LowBatchGEMV(2),),
        "eight": (gpu.LowBatchGEMV(4),),
        "many": (gpu.Matmul(),),
    }
    rows = 1 if name == "one" else None
    module = tvm.IRModule({"main": linear(K, N, group_size, rows)})
    with Target(plain):
        module = dlight.ApplyDefaultSchedule(*rules[name])(module)
    return module["main"]
