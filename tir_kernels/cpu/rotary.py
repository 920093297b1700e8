"""Splitting the fused q, k, v and rotating q and k (arXiv 2104.09864), pairs as in llama."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.elementwise import MANY
from tir_kernels.cpu.fast_math import beyond, quarter_turns, sine
from tir_kernels.memo import memoized


@memoized
def split_rotary(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str, scale: float
) -> PrimFunc:
    """(qkv [s, q + 2 kv heads, d], positions int32 [s], q, k, v, frequencies fp32 [d/2]).

    frequencies are radians per position; cos and sin are multiplied by `scale`. The signature is
    the one that TVM's paged KV cache calls when it is given rope_ext_factors, which are the table
    here: it reaches the kernel unchanged.
    """
    half = head_dim // 2
    heads = q_heads + 2 * kv_heads

    @T.inline
    def rotate(qkv, s, h, out, out_h, cos, sin):
        for d in T.vectorized(half):
            out[s, out_h, d] = T.Cast(
                dtype,
                T.Cast("float32", qkv[s, h, d]) * cos[d]
                - T.Cast("float32", qkv[s, h, half + d]) * sin[d],
            )
        for d in T.vectorized(half):
            out[s, out_h, half + d] = T.Cast(
                dtype,
                T.Cast("float32", qkv[s, h, half + d]) * cos[d]
                + T.Cast("float32", qkv[s, h, d]) * sin[d],
            )

    @T.inline
    def rotate_row(s, qkv, positions, q, k, v, frequencies):
        cos = T.alloc_buffer((half,), "float32")
        sin = T.alloc_buffer((half,), "float32")
        rest = T.alloc_buffer((half,), "float32")
        quarters = T.alloc_buffer((half,), "int32")
        for d in T.vectorized(half):
            cos[d] = T.Cast("float32", positions[s]) * frequencies[d]
        for d in T.vectorized(half):
            quarters[d] = quarter_turns(cos[d])
        for d in T.vectorized(half):
            rest[d] = beyond(cos[d], quarters[d])
        for d in T.vectorized(half):
            sin[d] = sine(quarters[d], rest[d]) * T.float32(scale)
        for d in T.vectorized(half):
            cos[d] = sine(quarters[d] + 1, rest[d]) * T.float32(scale)
        for h in range(q_heads):
            rotate(qkv, s, h, q, h, cos, sin)
        for h in range(kv_heads):
            rotate(qkv, s, q_heads + h, k, h, cos, sin)
        for h in range(kv_heads):
            for d in T.vectorized(head_dim):
                v[s, h, d] = qkv[s, q_heads + kv_heads + h, d]

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
        qkv = T.match_buffer(qkv_handle, (rows, heads, head_dim), dtype)
        positions = T.match_buffer(positions_handle, (rows,), "int32", elem_offset=positions_offset)
        q = T.match_buffer(q_handle, (rows, q_heads, head_dim), dtype)
        k = T.match_buffer(k_handle, (rows, kv_heads, head_dim), dtype)
        v = T.match_buffer(v_handle, (rows, kv_heads, head_dim), dtype)
        if rows < MANY:
            for s in range(rows):
                rotate_row(s, qkv, positions, q, k, v, frequencies)
        else:
            for s in T.parallel(rows):
                rotate_row(s, qkv, positions, q, k, v, frequencies)

    return rotary
