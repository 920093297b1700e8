"""Few rows times 4-bit weights in the tiled layout: every weight is read once.

A workgroup has a few stripes of 16 outputs and walks along K in chunks of slices * depth tiles. In
a chunk, 32 invocations (a slice) have `depth` neighbouring tiles of each stripe, 16 bytes of a tile
an invocation. The activations of a chunk go through workgroup memory in the order in which the
layout wants them: the four inputs that belong to one half of a word's nibbles come in one load.

Loads of weights, scales and zero points come before the barrier that activations wait for, and thus
overlap them. Weights are unpacked to q - z, which is exact; the scale is applied to the fp32 sum of
a group, or, where sums are many, to the weight, which saves registers. Tokens beyond m repeat the
last one, stripes and tiles beyond the weight repeat its last ones: nobody stores what comes of the
former, and activations beyond K are zero.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import TILE_K, TILE_N, LinearShape
from tir_kernels.vulkan.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.vulkan.limits import Limits
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import LANES, TiledFewRows
from tir_kernels.vulkan.unpack import magic, magic_zero

STEPS = TILE_K // 16  # words of an invocation in a tile
VECTORS = TILE_K // 4  # of four activations in a tile


def _columns(pair: Any) -> tuple[Any, Any]:
    first = pair // 8 * TILE_N + pair % 8
    return first, first + 8


def tiled_few_rows(
    shape: LinearShape,
    reader: Reader,
    schedule: TiledFewRows,
    epilogue: Epilogue,
    limits: Limits,
) -> Any:
    """A block builder (see `launch`) for m <= schedule.rows and the operands of `launch.tiled`."""
    K, G, tiles, groups = shape.K, shape.group_size, shape.tile_columns, shape.groups
    rows, slices, depth, stripes = (
        schedule.rows, schedule.slices, schedule.depth, schedule.stripes,
    )  # fmt: skip
    invocations = schedule.invocations
    chunk = slices * depth
    vectors = chunk * VECTORS
    group_steps = min(G // 16, depth * STEPS)
    chunk_groups = depth * STEPS // group_steps
    scale_weights = rows > 4

    sums = Sums(
        rows,
        invocations,
        pairs=stripes,
        members=4 * slices,
        slot=lambda p: p // 8,
        member=lambda p, c: c // 4 * LANES + p % 8 * 4 + c % 4,
        columns=lambda p: (p, p) if epilogue.silu else _columns(p),
    )
    fetch = reader.fetch(exact=tiles % chunk == 0 and K % TILE_K == 0)
    convert = reader.convert()
    finish = reduce_and_store(sums, epilogue, limits.workgroup_bytes - rows * vectors * 16)

    @T.inline
    def load_weights(operands, count, block, tile, lane, words, zero, scale):
        tile_words, zero_words, scale_pairs = T.meta_var(operands)
        both = T.alloc_buffer((1,), "int32", scope="local")
        for s in T.unroll(stripes):
            stripe = T.meta_var(T.min(block * stripes + s, count - 1))
            for u in T.unroll(depth):
                words[T.ramp((s * depth + u) * 4, 1, 4)] = tile_words[
                    stripe, T.min(tile + u, tiles - 1), lane
                ]
            for p in T.unroll(chunk_groups):
                group = T.meta_var(T.min(tile * TILE_K // G + p, groups - 1))
                scale[T.ramp((s * chunk_groups + p) * 2, 1, 2)] = T.Cast(
                    "float32x2", scale_pairs[stripe, group, lane // 4]
                )
                both[0] = T.shift_right(zero_words[stripe, group, lane // 16], lane // 4 % 4 * 8)
                for i in T.unroll(4):
                    zero[(s * chunk_groups + p) * 4 + i] = magic_zero(
                        T.bitwise_and(T.shift_right(both[0], i % 2 * 4), 15), i
                    )

    @T.inline
    def stage(m, k, thread, x_view, xs):
        registers = T.alloc_buffer((4,), reader.register, scope="local")
        values = T.alloc_buffer((4,), "float32", scope="local")
        for j in T.unroll(-(-rows * vectors // invocations)):
            v = T.meta_var(thread + j * invocations)
            if v < rows * vectors:
                row = T.meta_var(T.min(v // vectors, m - 1) if rows > 1 else 0)
                fetch(x_view, row, k + v % vectors // 4 * 16 + v % 4 * 2, registers, 0)
                convert(registers, 0, values)
                xs[v] = values[T.ramp(0, 1, 4)]

    def weight(words, zero, scale, s, step, h, p):
        """Weight of output 8h + g and the p-th of the four inputs of a step."""
        i = p // 2 * 2 + h
        group = s * chunk_groups + step // group_steps
        word = T.shift_right(words[s * depth * STEPS + step], p % 2 * 16)
        difference = magic(word, i) - zero[group * 4 + i]
        return difference * scale[group * 2 + h] if scale_weights else difference

    @T.inline
    def multiply(step, slice_, lane, words, zero, scale, xs, total):
        value = T.alloc_buffer((stripes * 8,), "float32", scope="local")
        four = T.alloc_buffer((4,), "float32", scope="local")
        for s in T.unroll(stripes):
            for h in T.unroll(2):
                for p in T.unroll(4):
                    value[(s * 2 + h) * 4 + p] = weight(words, zero, scale, s, step, h, p)
        for r in T.unroll(rows):
            four[T.ramp(0, 1, 4)] = xs[r * vectors + (slice_ * depth * STEPS + step) * 4 + lane % 4]
            for o in T.unroll(2 * stripes):
                for p in T.unroll(4):
                    total[r * 2 * stripes + o] = (
                        total[r * 2 * stripes + o] + four[p] * value[o * 4 + p]
                    )

    @T.inline
    def add_by_groups(slice_, lane, words, zero, scale, xs, total):
        group_sum = T.alloc_buffer((rows * 2 * stripes,), "float32", scope="local")
        for p in T.unroll(chunk_groups):
            for o in T.unroll(rows * 2 * stripes):
                group_sum[o] = T.float32(0)
            for step in T.unroll(group_steps):
                multiply(p * group_steps + step, slice_, lane, words, zero, scale, xs, group_sum)
            for o in T.unroll(rows * 2 * stripes):
                factor = T.meta_var(scale[(o // 2 % stripes * chunk_groups + p) * 2 + o % 2])
                total[o] = total[o] + factor * group_sum[o]

    @T.inline
    def add_by_steps(slice_, lane, words, zero, scale, xs, total):
        for step in T.unroll(depth * STEPS):
            multiply(step, slice_, lane, words, zero, scale, xs, total)

    add_chunk = add_by_steps if scale_weights else add_by_groups

    @T.inline
    def kernel(m, count, first_column, x_view, operands, bias, out):
        for block in T.thread_binding(T.ceildiv(count, stripes), thread="blockIdx.x"):
            for thread in T.thread_binding(invocations, thread="threadIdx.x"):
                xs = T.alloc_buffer((rows * vectors,), "float32x4", scope="shared")
                words = T.alloc_buffer((stripes * depth * 4,), "int32", scope="local")
                scale = T.alloc_buffer((stripes * chunk_groups * 2,), "float32", scope="local")
                zero = T.alloc_buffer((stripes * chunk_groups * 4,), "float32", scope="local")
                total = T.alloc_buffer((rows * 2 * stripes,), "float32", scope="local")
                lane = T.meta_var(thread % LANES)
                slice_ = T.meta_var(thread // LANES)
                for o in T.unroll(rows * 2 * stripes):
                    total[o] = T.float32(0)
                for c in range(-(-tiles // chunk)):
                    load_weights(
                        operands, count, block, c * chunk + slice_ * depth, lane, words, zero, scale
                    )
                    if tiles > chunk:
                        T.tvm_storage_sync("shared")
                    stage(m, c * chunk * TILE_K, thread, x_view, xs)
                    T.tvm_storage_sync("shared")
                    add_chunk(slice_, lane, words, zero, scale, xs, total)
                column = T.meta_var(first_column + block * epilogue.columns(stripes * TILE_N))
                finish(m, column, thread, total, bias, out)

    return kernel
