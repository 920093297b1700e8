"""What one token goes through between two attentions, in a single launch.

The rest of a block behind its attention (output projection, residual, norm, SwiGLU, residual) and
the norm and projection in front of the next attention are, for one row, little work around four
weights that have to be read. Launched one by one, threads wait for each other a dozen times a
block, and memory rests while they do. Here they start once:

* what lies between the linears is a few thousand values, and every thread computes it for itself,
  in its own cache, sooner than it could wait for another;
* between linears they meet at a barrier, which costs less than a launch;
* gate and up are the two streams of the row kernel (`blocked_row`), and meet in its registers.

All values are rounded where separate kernels would store them, so that results are the same bits.

Work is cut into as many shares as there are threads. That is said here and not left to TVM, whose
passes put memory of a thread's own into the bodies of parallel loops only: a share is one pass of
such a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.activations import planes_of, quantize_group
from tir_kernels.cpu.blocked_row import row_step, steps_of
from tir_kernels.cpu.blocked_weight import four_bit_weight
from tir_kernels.cpu.elementwise import add_and_norm_row, silu
from tir_kernels.cpu.quantized_rows import row_words
from tir_kernels.layouts import BLOCK_N, BLOCKED, LinearShape
from tir_kernels.memo import memoized


@dataclass(frozen=True)
class DecodeBlock:
    """The linears of one launch, none of them with a bias but qkv.

    qkv: of the next block; None behind the last one. All inputs come in whole groups, and groups
    are whole blocks: gate and up begin at blocks of their own.
    """

    o: LinearShape
    gate_up: LinearShape
    down: LinearShape
    qkv: LinearShape | None
    qkv_bias: bool = False

    @property
    def hidden(self) -> int:
        return self.o.N

    @property
    def inner(self) -> int:
        return self.down.K


@memoized
def decode_block(
    target: Target,
    block: DecodeBlock,
    eps: float,
    dtype: str,
    *,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """One row: (attended [1, o.K], residual [1, hidden], o's weight, norm [hidden], gate_up's
    weight, down's weight, next norm [hidden], ...).

    Weights are qweight, qzeros and scales in the layout BLOCKED; norms are RMS norms with `eps`.
    What follows is qkv's weight[, bias], the new residual [1, hidden] and qkv's outputs
    [1, qkv.N]; or, without qkv, the normed hidden state [1, hidden]. act_bits: as of
    `blocked_linear`.
    """
    h = block.hidden

    def dims(shape: LinearShape) -> list[tuple[int, ...]]:
        return [size for size, _ in shape.parameters(BLOCKED, scale_dtype).values()]

    (oq, oz, os), (gq, gz, gs), (dq, dz, ds) = map(dims, (block.o, block.gate_up, block.down))
    run = _launch(target, block, eps, dtype, act_bits)
    if block.qkv is None:

        @T.prim_func(private=True, s_tir=True)
        def last(
            attended: T.Buffer((1, block.o.K), dtype),
            residual: T.Buffer((1, h), dtype),
            o_qweight: T.Buffer(oq, "int32"),
            o_qzeros: T.Buffer(oz, "int32"),
            o_scales: T.Buffer(os, scale_dtype),
            norm: T.Buffer((h,), dtype),
            gate_up_qweight: T.Buffer(gq, "int32"),
            gate_up_qzeros: T.Buffer(gz, "int32"),
            gate_up_scales: T.Buffer(gs, scale_dtype),
            down_qweight: T.Buffer(dq, "int32"),
            down_qzeros: T.Buffer(dz, "int32"),
            down_scales: T.Buffer(ds, scale_dtype),
            next_norm: T.Buffer((h,), dtype),
            out: T.Buffer((1, h), dtype),
        ):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            o = T.meta_var((o_qweight, o_qzeros, o_scales))
            gate_up = T.meta_var((gate_up_qweight, gate_up_qzeros, gate_up_scales))
            down = T.meta_var((down_qweight, down_qzeros, down_scales))
            norms = T.meta_var((norm, next_norm))
            weights = T.meta_var((o, gate_up, down, None))
            run(attended, residual, weights, norms, None, None, out)

        return last

    (qq, qz, qs), outputs = dims(block.qkv), block.qkv.N

    @T.prim_func(private=True, s_tir=True)
    def middle(
        attended: T.Buffer((1, block.o.K), dtype),
        residual: T.Buffer((1, h), dtype),
        o_qweight: T.Buffer(oq, "int32"),
        o_qzeros: T.Buffer(oz, "int32"),
        o_scales: T.Buffer(os, scale_dtype),
        norm: T.Buffer((h,), dtype),
        gate_up_qweight: T.Buffer(gq, "int32"),
        gate_up_qzeros: T.Buffer(gz, "int32"),
        gate_up_scales: T.Buffer(gs, scale_dtype),
        down_qweight: T.Buffer(dq, "int32"),
        down_qzeros: T.Buffer(dz, "int32"),
        down_scales: T.Buffer(ds, scale_dtype),
        next_norm: T.Buffer((h,), dtype),
        qkv_qweight: T.Buffer(qq, "int32"),
        qkv_qzeros: T.Buffer(qz, "int32"),
        qkv_scales: T.Buffer(qs, scale_dtype),
        new_residual: T.Buffer((1, h), dtype),
        out: T.Buffer((1, outputs), dtype),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        o = T.meta_var((o_qweight, o_qzeros, o_scales))
        gate_up = T.meta_var((gate_up_qweight, gate_up_qzeros, gate_up_scales))
        down = T.meta_var((down_qweight, down_qzeros, down_scales))
        qkv = T.meta_var((qkv_qweight, qkv_qzeros, qkv_scales))
        norms = T.meta_var((norm, next_norm))
        weights = T.meta_var((o, gate_up, down, qkv))
        run(attended, residual, weights, norms, _no_offset, new_residual, out)

    @T.prim_func(private=True, s_tir=True)
    def middle_bias(
        attended: T.Buffer((1, block.o.K), dtype),
        residual: T.Buffer((1, h), dtype),
        o_qweight: T.Buffer(oq, "int32"),
        o_qzeros: T.Buffer(oz, "int32"),
        o_scales: T.Buffer(os, scale_dtype),
        norm: T.Buffer((h,), dtype),
        gate_up_qweight: T.Buffer(gq, "int32"),
        gate_up_qzeros: T.Buffer(gz, "int32"),
        gate_up_scales: T.Buffer(gs, scale_dtype),
        down_qweight: T.Buffer(dq, "int32"),
        down_qzeros: T.Buffer(dz, "int32"),
        down_scales: T.Buffer(ds, scale_dtype),
        next_norm: T.Buffer((h,), dtype),
        qkv_qweight: T.Buffer(qq, "int32"),
        qkv_qzeros: T.Buffer(qz, "int32"),
        qkv_scales: T.Buffer(qs, scale_dtype),
        bias: T.Buffer((outputs,), dtype),
        new_residual: T.Buffer((1, h), dtype),
        out: T.Buffer((1, outputs), dtype),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        o = T.meta_var((o_qweight, o_qzeros, o_scales))
        gate_up = T.meta_var((gate_up_qweight, gate_up_qzeros, gate_up_scales))
        down = T.meta_var((down_qweight, down_qzeros, down_scales))
        qkv = T.meta_var((qkv_qweight, qkv_qzeros, qkv_scales))
        norms = T.meta_var((norm, next_norm))
        weights = T.meta_var((o, gate_up, down, qkv))
        offset = T.meta_var(lambda column: T.Cast("float32", bias[column]))
        run(attended, residual, weights, norms, offset, new_residual, out)

    return middle_bias if block.qkv_bias else middle


def _launch(target: Target, block: DecodeBlock, eps: float, dtype: str, act_bits: int) -> Any:
    """TIR (attended, residual, weights, norms, offset, new_residual, out): see `decode_block`.

    weights: of o, gate_up, down and qkv; offset: of qkv's outputs.
    """
    h, inner = block.hidden, block.inner
    linear = {"dtype": dtype, "act_bits": act_bits}
    o, down = _projection(target, block.o, **linear), _projection(target, block.down, **linear)
    gate_up = _projection(target, block.gate_up, **linear, finish=_swiglu(dtype))
    qkv = None if block.qkv is None else _projection(target, block.qkv, **linear)
    add_and_norm = add_and_norm_row(target, h, eps, dtype)

    @T.inline
    def keep(share, shares, row, out):
        """A share of a row that every thread has."""
        for i in range(share * (h // BLOCK_N) // shares, (share + 1) * (h // BLOCK_N) // shares):
            for j in T.vectorized(BLOCK_N):
                out[0, i * BLOCK_N + j] = row[0, i * BLOCK_N + j]

    @T.inline
    def launch(attended, residual, weights, norms, offset, new_residual, out):
        # One buffer, because TVM gives the place of what is used no more to what is written next,
        # and does not see that another thread may still be reading it.
        shared = T.alloc_buffer((3 * h + inner,), dtype)
        o_out = T.decl_buffer((1, h), dtype, data=shared.data)
        kept = T.decl_buffer((1, h), dtype, data=shared.data, elem_offset=h)
        down_out = T.decl_buffer((1, h), dtype, data=shared.data, elem_offset=2 * h)
        activated = T.decl_buffer((1, inner), dtype, data=shared.data, elem_offset=3 * h)
        shares: T.let[T.int32] = T.call_packed("runtime.NumThreads")
        with T.attr(T.int32(0), "pragma_parallel_launch_point", 1):
            with T.attr(T.int32(0), "pragma_parallel_barrier_when_finish", 1):
                for share in T.parallel(shares):
                    o(share, shares, attended, weights[0], _no_offset, o_out)
            with T.attr(T.int32(0), "pragma_parallel_barrier_when_finish", 1):
                for share in T.parallel(shares):
                    total = T.alloc_buffer((1, h), dtype)
                    normed = T.alloc_buffer((1, h), dtype)
                    add_and_norm(0, o_out, residual, norms[0], total, normed)
                    keep(share, shares, total, kept)
                    gate_up(share, shares, normed, weights[1], _no_offset, activated)
            with T.attr(T.int32(0), "pragma_parallel_barrier_when_finish", 1):
                for share in T.parallel(shares):
                    down(share, shares, activated, weights[2], _no_offset, down_out)
            for share in T.parallel(shares):
                total = T.alloc_buffer((1, h), dtype)
                normed = T.alloc_buffer((1, h), dtype)
                add_and_norm(0, down_out, kept, norms[1], total, normed)
                if qkv is None:
                    keep(share, shares, normed, out)
                else:
                    keep(share, shares, total, new_residual)
                    qkv(share, shares, normed, weights[3], offset, out)

    return launch


def _projection(
    target: Target, shape: LinearShape, dtype: str, act_bits: int, finish: Any = None
) -> Any:
    """TIR (share, shares, x [1, K], weights, offset, out): a share of the outputs of a linear.

    finish: as of `row_step`.
    """
    planes, groups, size = planes_of(act_bits), shape.groups, shape.group_size
    weight = four_bit_weight(target, shape)
    quantize = quantize_group(target, size, act_bits)
    step = row_step(weight, dtype, planes, finish)
    steps = steps_of(weight)

    @T.inline
    def project(share, shares, x, weights, offset, out):
        xq = T.alloc_buffer((planes, 1, shape.K // 4), "int32")
        xscale = T.alloc_buffer((1, groups), "float32")
        xsum = T.alloc_buffer((1, groups), "int32")
        for g in range(groups):
            at = T.meta_var(row_words(0, g * size))
            quantize(x, 0, g * size, xq, at, xscale, xsum, 0, g)
        for i in range(share * steps // shares, (share + 1) * steps // shares):
            step(i, 0, xq, xscale, xsum, weights, offset, out)

    return project


def _swiglu(dtype: str) -> Any:
    """What becomes of the sums of block i of the gate, and of that of up (arXiv 2002.05202)."""

    def rounded(value: Any) -> Any:
        return T.Cast("float32", T.Cast(dtype, value))

    @T.inline
    def activate(total, i, first, offset, out):
        for j in T.vectorized(BLOCK_N):
            out[first, i * BLOCK_N + j] = T.Cast(
                dtype, silu(rounded(total[0, j])) * rounded(total[1, j])
            )

    return activate


def _no_offset(column: Any) -> Any:
    return T.float32(0)
