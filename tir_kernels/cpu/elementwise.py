"""What a decoder does between its linears, each in one pass over memory, with fp32 inside."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp
from tir_kernels.cpu.tiling import largest_fitting, tiling_of
from tir_kernels.memo import memoized

MANY = 8  # rows from which on waking other threads pays


@memoized
def rms_norm(target: Target, size: int, eps: float, dtype: str) -> PrimFunc:
    """(x [m, size], weight [size], out [m, size]): root mean square norm (arXiv 1910.07467)."""
    norm_row = _norm_row(target, size, eps, dtype)

    @T.prim_func(private=True, s_tir=True)
    def norm(x_handle: T.handle, weight: T.Buffer((size,), dtype), out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        if m < MANY:
            for r in range(m):
                norm_row(r, x, weight, out)
        else:
            for r in T.parallel(m):
                norm_row(r, x, weight, out)

    return norm


@memoized
def add_rms_norm(target: Target, size: int, eps: float, dtype: str) -> PrimFunc:
    """(x [m, size], residual [m, size], weight [size], total [m, size], out [m, size]).

    total = x + residual, rounded to dtype as the residual stream is; out = norm of it.
    """
    norm_row = add_and_norm_row(target, size, eps, dtype)

    @T.prim_func(private=True, s_tir=True)
    def norm(
        x_handle: T.handle,
        residual_handle: T.handle,
        weight: T.Buffer((size,), dtype),
        total_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, size), dtype)
        residual = T.match_buffer(residual_handle, (m, size), dtype)
        total = T.match_buffer(total_handle, (m, size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        if m < MANY:
            for r in range(m):
                norm_row(r, x, residual, weight, total, out)
        else:
            for r in T.parallel(m):
                norm_row(r, x, residual, weight, total, out)

    return norm


@memoized
def qk_norm(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> PrimFunc:
    """(qkv [m, (q + 2 kv) d], q_weight [d], k_weight [d], out): each head of q and k normalized.

    The heads of v are copied. Qwen 3 does this before the rotation.
    """
    lanes, root_mean_square = _root_mean_square(target, head_dim, eps)
    width = (q_heads + 2 * kv_heads) * head_dim

    @T.inline
    def normalize_head(qkv, r, first, weight, inverse, out):
        read = T.meta_var(_row_of(qkv, r, first))
        root_mean_square(read, inverse)
        for i in range(head_dim // lanes):
            for j in T.vectorized(lanes):
                out[r, first + i * lanes + j] = T.Cast(
                    dtype,
                    read(i * lanes + j) * inverse[0] * T.Cast("float32", weight[i * lanes + j]),
                )

    @T.inline
    def norm_row(r, qkv, q_weight, k_weight, out):
        inverse = T.alloc_buffer((1,), "float32")
        for h in range(q_heads):
            normalize_head(qkv, r, h * head_dim, q_weight, inverse, out)
        for h in range(kv_heads):
            normalize_head(qkv, r, (q_heads + h) * head_dim, k_weight, inverse, out)
        for h in range(kv_heads):
            for j in T.vectorized(head_dim):
                column = T.meta_var((q_heads + kv_heads + h) * head_dim + j)
                out[r, column] = qkv[r, column]

    @T.prim_func(private=True, s_tir=True)
    def norm(
        qkv_handle: T.handle,
        q_weight: T.Buffer((head_dim,), dtype),
        k_weight: T.Buffer((head_dim,), dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        qkv = T.match_buffer(qkv_handle, (m, width), dtype)
        out = T.match_buffer(out_handle, (m, width), dtype)
        if m < MANY:
            for r in range(m):
                norm_row(r, qkv, q_weight, k_weight, out)
        else:
            for r in T.parallel(m):
                norm_row(r, qkv, q_weight, k_weight, out)

    return norm


@memoized
def silu_multiply(target: Target, size: int, dtype: str) -> PrimFunc:
    """(gate_up [m, 2 size], out [m, size]): silu(gate) * up, as in SwiGLU (arXiv 2002.05202)."""
    lanes = _lanes(target, size)

    @T.inline
    def activate_row(r, gate_up, out):
        for i in range(size // lanes):
            for j in T.vectorized(lanes):
                out[r, i * lanes + j] = T.Cast(
                    dtype,
                    silu(T.Cast("float32", gate_up[r, i * lanes + j]))
                    * T.Cast("float32", gate_up[r, size + i * lanes + j]),
                )

    @T.prim_func(private=True, s_tir=True)
    def activate(gate_up_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        gate_up = T.match_buffer(gate_up_handle, (m, 2 * size), dtype)
        out = T.match_buffer(out_handle, (m, size), dtype)
        if m < MANY:
            for r in range(m):
                activate_row(r, gate_up, out)
        else:
            for r in T.parallel(m):
                activate_row(r, gate_up, out)

    return activate


def add_and_norm_row(target: Target, size: int, eps: float, dtype: str):
    """TIR (r, x, residual, weight, total, out): row r of `add_rms_norm`."""
    lanes = _lanes(target, size)
    norm_row = _norm_row(target, size, eps, dtype)

    @T.inline
    def add_and_norm(r, x, residual, weight, total, out):
        for i in range(size // lanes):
            for j in T.vectorized(lanes):
                total[r, i * lanes + j] = T.Cast(
                    dtype,
                    T.Cast("float32", x[r, i * lanes + j])
                    + T.Cast("float32", residual[r, i * lanes + j]),
                )
        norm_row(r, total, weight, out)

    return add_and_norm


def silu(x):
    """x times its logistic function, in fp32."""
    return x / (T.float32(1) + exp(T.float32(0) - x))


def _row_of(x, r, first):
    """Element j of a row, from column `first` on, in fp32."""
    return lambda j: T.Cast("float32", x[r, first + j])


def _lanes(target: Target, size: int) -> int:
    """The widest vector that walks `size` values without a tail."""
    lanes = largest_fitting(size, (tiling_of(target).lanes, 8, 4, 2, 1))
    return lanes if size % lanes == 0 else 1


def _norm_row(target: Target, size: int, eps: float, dtype: str):
    """TIR (r, x, weight, out): row r of `rms_norm`."""
    lanes, root_mean_square = _root_mean_square(target, size, eps)

    @T.inline
    def norm_row(r, x, weight, out):
        inverse = T.alloc_buffer((1,), "float32")
        read = T.meta_var(_row_of(x, r, 0))
        root_mean_square(read, inverse)
        for i in range(size // lanes):
            for j in T.vectorized(lanes):
                out[r, i * lanes + j] = T.Cast(
                    dtype,
                    read(i * lanes + j) * inverse[0] * T.Cast("float32", weight[i * lanes + j]),
                )

    return norm_row


def _root_mean_square(target: Target, size: int, eps: float):
    """The vector width for `size` values, and TIR that puts 1 / rms of read(0..size) in a cell."""
    lanes = _lanes(target, size)

    @T.inline
    def root_mean_square(read, inverse):
        squares = T.alloc_buffer((lanes,), "float32")
        for j in T.vectorized(lanes):
            squares[j] = T.float32(0)
        for i in range(size // lanes):
            for j in T.vectorized(lanes):
                squares[j] = squares[j] + read(i * lanes + j) * read(i * lanes + j)
        inverse[0] = T.float32(0)
        for j in T.unroll(lanes):
            inverse[0] = inverse[0] + squares[j]
        inverse[0] = T.float32(1) / T.sqrt(inverse[0] / T.float32(size) + T.float32(eps))

    return lanes, root_mean_square
