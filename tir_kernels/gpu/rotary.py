"""Splitting the fused q, k, v and rotating q and k (arXiv 2104.09864), pairs as in llama."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, at, vector_view, vector_width
from tir_kernels.gpu.trigonometry import sine_and_cosine
from tir_kernels.memo import memoized


@memoized
def split_rotary(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str, scale: float
) -> PrimFunc:
    """(qkv [s, q + 2 kv heads, d], positions int32 [s], q, k, v, frequencies fp32 [d/2]).

    frequencies are radians per position; cos and sin are multiplied by `scale`. The signature is
    the one that TVM's paged KV cache calls when it is given rope_ext_factors, which are the table
    here: it reaches the kernel unchanged.

    A block has one row; a thread has some pairs, whose angles it computes once, of several heads.
    """
    half = head_dim // 2
    heads = q_heads + 2 * kv_heads
    vec = vector_width(target, half, dtype)
    lanes = half // vec
    slots = min(heads, max(1, THREADS // lanes))
    evaluate = sine_and_cosine()

    @T.inline
    def rotate(low, high, cos, sin, rotated):
        for j in T.unroll(vec):
            a = T.meta_var(T.Cast("float32", low[j]))
            b = T.meta_var(T.Cast("float32", high[j]))
            rotated[j] = T.Cast(dtype, a * cos[j] - b * sin[j])
            rotated[vec + j] = T.Cast(dtype, b * cos[j] + a * sin[j])

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
        rows = T.int32()
        positions_at = T.int32()
        qkv = T.match_buffer(qkv_handle, (rows, heads, head_dim), dtype)
        positions = T.match_buffer(positions_handle, (rows,), "int32", elem_offset=positions_at)
        q = T.match_buffer(q_handle, (rows, q_heads, head_dim), dtype)
        k = T.match_buffer(k_handle, (rows, kv_heads, head_dim), dtype)
        v = T.match_buffer(v_handle, (rows, kv_heads, head_dim), dtype)
        qkv_view = vector_view(qkv, dtype, vec)
        q_view = vector_view(q, dtype, vec)
        k_view = vector_view(k, dtype, vec)
        v_view = vector_view(v, dtype, vec)
        for s in T.thread_binding(rows, thread="blockIdx.x"):
            for t in T.thread_binding(lanes * slots, thread="threadIdx.x"):
                cos = T.alloc_buffer((vec,), "float32", scope="local")
                sin = T.alloc_buffer((vec,), "float32", scope="local")
                pair = T.alloc_buffer((3,), "float32", scope="local")
                quarter = T.alloc_buffer((1,), "int32", scope="local")
                low = T.alloc_buffer((vec,), dtype, scope="local")
                high = T.alloc_buffer((vec,), dtype, scope="local")
                rotated = T.alloc_buffer((2 * vec,), dtype, scope="local")
                lane = T.meta_var(t % lanes)
                for j in T.unroll(vec):
                    evaluate(
                        T.Cast("float32", positions[s]) * frequencies[lane * vec + j],
                        pair,
                        quarter,
                    )
                    sin[j] = pair[0] * T.float32(scale)
                    cos[j] = pair[1] * T.float32(scale)
                for step in range(-(-heads // slots)):
                    h: T.let[T.int32] = step * slots + t // lanes
                    if h < heads:
                        low[at(0, vec)] = qkv_view[s, h, lane]
                        high[at(0, vec)] = qkv_view[s, h, lanes + lane]
                        rotate(low, high, cos, sin, rotated)
                        if h < q_heads:
                            q_view[s, h, lane] = rotated[at(0, vec)]
                            q_view[s, h, lanes + lane] = rotated[at(vec, vec)]
                        elif h < q_heads + kv_heads:
                            k_view[s, h - q_heads, lane] = rotated[at(0, vec)]
                            k_view[s, h - q_heads, lanes + lane] = rotated[at(vec, vec)]
                        else:
                            v_view[s, h - q_heads - kv_heads, lane] = low[at(0, vec)]
                            v_view[s, h - q_heads - kv_heads, lanes + lane] = high[at(0, vec)]

    return rotary
