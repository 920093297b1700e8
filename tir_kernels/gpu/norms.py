"""Root mean square norms (arXiv 1910.07467), with fp32 inside: a block keeps a row in registers."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, at, block_sum, threads_for, vector_view, vector_width
from tir_kernels.memo import memoized


@memoized
def rms_norm(target: Target, size: int, eps: float, dtype: str) -> PrimFunc:
    """(x [m, size], weight [size], out [m, size])."""
    vec = vector_width(target, size, dtype)
    threads = threads_for(size // vec, _most_threads(target))
    steps = -(-size // (threads * vec))
    finish = _finish(size, eps, dtype, vec, threads)

    @T.prim_func(private=True, s_tir=True)
    def norm(x_handle: T.handle, weight: T.Buffer((size,), dtype), out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int32()
        x = T.match_buffer(x_handle, (m, size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        x_view = vector_view(x, dtype, vec)
        weight_view = vector_view(weight, dtype, vec)
        out_view = vector_view(out, dtype, vec)
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                row = T.alloc_buffer((steps * vec,), dtype, scope="local")
                squares = T.alloc_buffer((1,), "float32", scope="local")
                squares[0] = T.float32(0)
                for s in T.unroll(steps):
                    v = T.meta_var(s * threads + t)
                    if v < size // vec:
                        row[at(s * vec, vec)] = x_view[r, v]
                        for j in T.unroll(vec):
                            value = T.meta_var(T.Cast("float32", row[s * vec + j]))
                            squares[0] = squares[0] + value * value
                finish(r, t, row, squares, weight_view, out_view)

    return norm


@memoized
def add_rms_norm(target: Target, size: int, eps: float, dtype: str) -> PrimFunc:
    """(x [m, size], residual [m, size], weight [size], total [m, size], out [m, size]).

    total = x + residual, rounded to dtype as the residual stream is; out = norm of it.
    """
    vec = vector_width(target, size, dtype)
    threads = threads_for(size // vec, _most_threads(target))
    steps = -(-size // (threads * vec))
    finish = _finish(size, eps, dtype, vec, threads)

    @T.prim_func(private=True, s_tir=True)
    def norm(
        x_handle: T.handle,
        residual_handle: T.handle,
        weight: T.Buffer((size,), dtype),
        total_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int32()
        x = T.match_buffer(x_handle, (m, size), dtype)
        residual = T.match_buffer(residual_handle, (m, size), dtype)
        total = T.match_buffer(total_handle, (m, size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        x_view = vector_view(x, dtype, vec)
        residual_view = vector_view(residual, dtype, vec)
        weight_view = vector_view(weight, dtype, vec)
        total_view = vector_view(total, dtype, vec)
        out_view = vector_view(out, dtype, vec)
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                row = T.alloc_buffer((steps * vec,), dtype, scope="local")
                one = T.alloc_buffer((vec,), dtype, scope="local")
                other = T.alloc_buffer((vec,), dtype, scope="local")
                squares = T.alloc_buffer((1,), "float32", scope="local")
                squares[0] = T.float32(0)
                for s in T.unroll(steps):
                    v = T.meta_var(s * threads + t)
                    if v < size // vec:
                        one[at(0, vec)] = x_view[r, v]
                        other[at(0, vec)] = residual_view[r, v]
                        for j in T.unroll(vec):
                            row[s * vec + j] = T.Cast(
                                dtype, T.Cast("float32", one[j]) + T.Cast("float32", other[j])
                            )
                            value = T.meta_var(T.Cast("float32", row[s * vec + j]))
                            squares[0] = squares[0] + value * value
                        total_view[r, v] = row[at(s * vec, vec)]
                finish(r, t, row, squares, weight_view, out_view)

    return norm


@memoized
def qk_norm(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> PrimFunc:
    """(qkv [m, (q + 2 kv) d], q_weight [d], k_weight [d], out): each head of q and k normalized.

    The heads of v are copied. Qwen 3 does this before the rotation. A block has several heads of
    one row, and the threads of a head read each other's sums.
    """
    d = head_dim
    vec = vector_width(target, d, dtype)
    lanes = d // vec
    heads = q_heads + 2 * kv_heads
    slots = min(heads, max(1, THREADS // lanes))
    threads = lanes * slots

    @T.prim_func(private=True, s_tir=True)
    def norm(
        qkv_handle: T.handle,
        q_weight: T.Buffer((d,), dtype),
        k_weight: T.Buffer((d,), dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int32()
        qkv = T.match_buffer(qkv_handle, (m, heads * d), dtype)
        out = T.match_buffer(out_handle, (m, heads * d), dtype)
        qkv_view = vector_view(qkv, dtype, vec)
        q_weight_view = vector_view(q_weight, dtype, vec)
        k_weight_view = vector_view(k_weight, dtype, vec)
        out_view = vector_view(out, dtype, vec)
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for group in T.thread_binding(-(-heads // slots), thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    partial = T.alloc_buffer((threads,), "float32", scope="shared")
                    values = T.alloc_buffer((vec,), dtype, scope="local")
                    gain = T.alloc_buffer((vec,), dtype, scope="local")
                    result = T.alloc_buffer((vec,), dtype, scope="local")
                    squares = T.alloc_buffer((1,), "float32", scope="local")
                    head = T.meta_var(group * slots + t // lanes)
                    lane = T.meta_var(t % lanes)
                    squares[0] = T.float32(0)
                    if head < heads:
                        values[at(0, vec)] = qkv_view[r, head * lanes + lane]
                        for j in T.unroll(vec):
                            value = T.meta_var(T.Cast("float32", values[j]))
                            squares[0] = squares[0] + value * value
                    partial[t] = squares[0]
                    T.tvm_storage_sync("shared")
                    squares[0] = T.float32(0)
                    for i in range(lanes):
                        squares[0] = squares[0] + partial[t // lanes * lanes + i]
                    squares[0] = T.float32(1) / T.sqrt(squares[0] / T.float32(d) + T.float32(eps))
                    if head < q_heads + kv_heads:
                        if head < q_heads:
                            gain[at(0, vec)] = q_weight_view[lane]
                        else:
                            gain[at(0, vec)] = k_weight_view[lane]
                        for j in T.unroll(vec):
                            result[j] = T.Cast(
                                dtype,
                                T.Cast("float32", values[j])
                                * squares[0]
                                * T.Cast("float32", gain[j]),
                            )
                        out_view[r, head * lanes + lane] = result[at(0, vec)]
                    else:
                        if head < heads:
                            out_view[r, head * lanes + lane] = values[at(0, vec)]

    return norm


def _most_threads(target: Target) -> int:
    """Long rows take more threads where there are more, rather than more registers of each."""
    return 512 if target.kind.name == "cuda" else THREADS


def _finish(size: int, eps: float, dtype: str, vec: int, threads: int):
    """TIR from each thread's sum of squares to the normalized row."""
    reduce = block_sum(threads)
    steps = -(-size // (threads * vec))

    @T.inline
    def finish(r, t, row, squares, weight, out):
        partial = T.alloc_buffer((threads,), "float32", scope="shared")
        rows = T.alloc_buffer((16,), "float32", scope="shared")
        gain = T.alloc_buffer((vec,), dtype, scope="local")
        result = T.alloc_buffer((vec,), dtype, scope="local")
        inverse = T.alloc_buffer((1,), "float32", scope="local")
        reduce(squares[0], t, partial, rows, inverse)
        inverse[0] = T.float32(1) / T.sqrt(inverse[0] / T.float32(size) + T.float32(eps))
        for s in T.unroll(steps):
            v = T.meta_var(s * threads + t)
            if v < size // vec:
                gain[at(0, vec)] = weight[v]
                for j in T.unroll(vec):
                    result[j] = T.Cast(
                        dtype,
                        T.Cast("float32", row[s * vec + j])
                        * inverse[0]
                        * T.Cast("float32", gain[j]),
                    )
                out[r, v] = result[at(0, vec)]

    return finish
