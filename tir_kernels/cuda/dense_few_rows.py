"""Decoding with an unquantized weight [N, K]: lm_head, and models without 4-bit weights.

A lane reads 16 bytes of rows g and g + 8 of a stripe of 16 outputs, eight inputs from 8t on of 32,
and the same inputs of token g. A sum may go through its inputs in any order, as long as both
operands agree: inputs 8t to 8t + 3 are the lane's share of one step of `mma` (whose inputs 2t,
2t + 1, 2t + 8 and 2t + 9 they are for the hardware) and the rest that of the next. So both
operands are in place as they come from memory.

The warps of a block share K out among themselves; each has `depth` such loads on their way.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device
from tir_kernels.cuda.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.cuda.few_rows_schedule import DenseFewRows
from tir_kernels.layouts import TILE_N

INPUTS = 32  # of two steps
CHUNK = 8  # 16-bit elements in 16 bytes


def dense_few_rows(K: int, act_dtype: str, schedule: DenseFewRows, epilogue: Epilogue) -> Any:
    """An inline builder (m, x, (weight [N, K],), bias, out) for m <= schedule.rows."""
    N = epilogue.N
    rows, W, D = schedule.rows, schedule.warps, schedule.depth
    share = schedule.share(K)
    rounds = -(-share // D)
    exact = share * W * INPUTS == K and share % D == 0
    aligned = K % CHUNK == 0
    eights = -(-rows // 8)
    sums = Sums(rows, W, 1)
    multiply = device.mma(act_dtype)

    @T.inline
    def load_chunk(load, d, buffer, row, k):
        """Eight inputs of a row, which may lie across the end where K is no multiple of eight."""
        if aligned:
            load(d, T.address_of(buffer[T.Cast("int64", row), k]))
        else:
            values = T.alloc_buffer((CHUNK,), act_dtype, scope="local")
            for i in T.unroll(CHUNK):
                values[i] = T.Cast(act_dtype, 0)
                if k + i < K:
                    values[i] = buffer[T.Cast("int64", row), k + i]
            device.pack(d, device.registers(values, 0))

    @T.inline
    def load_block(x, weight, stripe, m, lane, k, last, w, b, u):
        """What the lane has of 32 inputs, from its own k on; beyond the warp's part, nothing."""
        if not exact:
            for e in T.unroll(eights):
                for i in T.unroll(4):
                    b[u, e, i] = T.uint32(0)
        if k < last:
            for h in T.unroll(2):
                row = T.meta_var(T.min(stripe * TILE_N + lane // 4 + h * 8, N - 1))
                load_chunk(device.load_streamed, device.registers(w, u, h, 0), weight, row, k)
            for e in T.unroll(eights):
                token = T.meta_var(T.min(e * 8 + lane // 4, m - 1))
                load_chunk(device.load_cached, device.registers(b, u, e, 0), x, token, k)

    @T.inline
    def body(m, x, parameters, bias, out, stripe, warp, lane):
        (weight,) = parameters
        shared = T.meta_var(device.dynamic_shared(sums.floats, "float32"))
        w = T.alloc_buffer((D, 2, 4), "uint32", scope="local")
        b = T.alloc_buffer((D, eights, 4), "uint32", scope="local")
        a = T.alloc_buffer((4,), "uint32", scope="local")
        total = T.alloc_buffer((1, eights, 4), "float32", scope="local")
        k = T.alloc_buffer((1,), "int32", scope="local")
        last = T.meta_var(T.min((warp + 1) * share * INPUTS, K))

        for u in T.unroll(D):
            for h in T.unroll(2):
                for i in T.unroll(4):
                    w[u, h, i] = T.uint32(0)
        for e in T.unroll(eights):
            for i in T.unroll(4):
                total[0, e, i] = T.float32(0)
        k[0] = warp * share * INPUTS + lane % 4 * CHUNK
        for u in T.unroll(D):
            load_block(x, weight, stripe, m, lane, k[0] + u * INPUTS, last, w, b, u)
        for _ in T.serial(rounds, annotations={"disable_unroll": True}):
            k[0] = k[0] + D * INPUTS
            for u in T.unroll(D):
                for step in T.unroll(2):
                    for i in T.unroll(4):
                        a[i] = w[u, i % 2, step * 2 + i // 2]
                    for e in T.unroll(eights):
                        multiply(
                            device.registers(total, 0, e, 0),
                            device.registers(a, 0),
                            device.registers(b, u, e, step * 2),
                        )
                load_block(x, weight, stripe, m, lane, k[0] + u * INPUTS, last, w, b, u)
        reduce_and_store(epilogue, sums, m, stripe * TILE_N, warp, lane, shared, total, bias, out)

    @T.inline
    def kernel(m, x, parameters, bias, out):
        for stripe in T.thread_binding(-(-N // TILE_N), thread="blockIdx.x"):
            for warp in T.thread_binding(W, thread="threadIdx.y"):
                for lane in T.thread_binding(32, thread="threadIdx.x"):
                    body(T.Cast("int32", m), x, parameters, bias, out, stripe, warp, lane)

    return kernel
