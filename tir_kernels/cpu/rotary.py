"""Splitting the fused q, k, v and rotating q and k (arXiv 2104.09864), pairs as in llama."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.elementwise import MANY
from tir_kernels.cpu.fast_math import beyond, quarter_turns, sine
from tir_kernels.cpu.slots import Slots
from tir_kernels.memo import memoized


@memoized
def split_rotary(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    scale: float,
    *,
    stored: str | None = None,
) -> PrimFunc:
    """(qkv [s, q + 2 kv heads, d], positions int32 [s], q, k, v, frequencies fp32 [d/2]).

    frequencies are radians per position; cos and sin are multiplied by `scale`. The signature is
    the one that TVM's paged KV cache calls when it is given rope_ext_factors, which are the table
    here: it reaches the kernel unchanged. stored: as of `Slots`; k and v become slots.
    """
    half = head_dim // 2
    heads = q_heads + 2 * kv_heads
    slots = Slots(head_dim, dtype, stored)
    size, seen_q_heads = slots.size, slots.heads(q_heads)
    fill = slots.fill(target)

    @T.inline
    def rotate(x, r, first, out, out_r, out_first, cos, sin):
        for j in T.vectorized(half):
            out[out_r, out_first + j] = T.Cast(
                dtype,
                T.Cast("float32", x[r, first + j]) * cos[j]
                - T.Cast("float32", x[r, first + half + j]) * sin[j],
            )
        for j in T.vectorized(half):
            out[out_r, out_first + half + j] = T.Cast(
                dtype,
                T.Cast("float32", x[r, first + half + j]) * cos[j]
                + T.Cast("float32", x[r, first + j]) * sin[j],
            )

    @T.inline
    def rotate_row(s, qkv, positions, q, k, v, frequencies):
        cos = T.alloc_buffer((half,), "float32")
        sin = T.alloc_buffer((half,), "float32")
        rest = T.alloc_buffer((half,), "float32")
        quarters = T.alloc_buffer((half,), "int32")
        key = T.alloc_buffer((1, head_dim), dtype)
        for j in T.vectorized(half):
            cos[j] = T.Cast("float32", positions[s]) * frequencies[j]
        for j in T.vectorized(half):
            quarters[j] = quarter_turns(cos[j])
        for j in T.vectorized(half):
            rest[j] = beyond(cos[j], quarters[j])
        for j in T.vectorized(half):
            sin[j] = sine(quarters[j], rest[j]) * T.float32(scale)
        for j in T.vectorized(half):
            cos[j] = sine(quarters[j] + 1, rest[j]) * T.float32(scale)
        for h in range(q_heads):
            rotate(qkv, s, h * head_dim, q, s, h * head_dim, cos, sin)
        for h in range(kv_heads):
            rotate(qkv, s, (q_heads + h) * head_dim, key, 0, 0, cos, sin)
            fill(key, 0, 0, k, s, h)
        for h in range(kv_heads):
            fill(qkv, s, (q_heads + kv_heads + h) * head_dim, v, s, h)

    @T.prim_func(private=True, s_tir=True)
    def rotary(
        qkv_handle: T.handle,
        positions_handle: T.handle,
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        frequencies: T.Buffer((half,), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        rows = T.int64()
        positions_offset = T.int64()
        seen_qkv = T.match_buffer(qkv_handle, (rows, seen_q_heads + 2 * kv_heads, size), dtype)
        positions = T.match_buffer(positions_handle, (rows,), "int32", elem_offset=positions_offset)
        seen_q = T.match_buffer(q_handle, (rows, seen_q_heads, size), dtype)
        k = T.match_buffer(k_handle, (rows, kv_heads, size), dtype)
        v = T.match_buffer(v_handle, (rows, kv_heads, size), dtype)
        qkv = T.decl_buffer((rows, heads * head_dim), dtype, data=seen_qkv.data)
        q = T.decl_buffer((rows, q_heads * head_dim), dtype, data=seen_q.data)
        if rows < MANY:
            for s in range(rows):
                rotate_row(s, qkv, positions, q, k, v, frequencies)
        else:
            for s in T.parallel(rows):
                rotate_row(s, qkv, positions, q, k, v, frequencies)

    return rotary
