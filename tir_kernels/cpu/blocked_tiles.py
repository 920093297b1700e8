"""Many rows against the blocked layout with AMX: 16 rows by 16 outputs by 64 inputs an instruction.

A thread unpacks the weights of a few blocks once, into the tiles that AMX multiplies with, and goes
through all rows with them, a panel at a time: what it accumulates stays in the nearest cache.
"""

from __future__ import annotations

from tir_kernels._tvm import T, Target
from tir_kernels.cpu import amx
from tir_kernels.cpu.activations import planes_of, quantize_group
from tir_kernels.cpu.blocked_weight import four_bit_weight, nibbles, store_outputs
from tir_kernels.cpu.prefetching import asked_for
from tir_kernels.layouts import BLOCK_N, PACK, LinearShape

CHUNK = 512  # rows that are quantized at a time
PANEL = 64  # rows whose fp32 sums are accumulated together
BLOCKS = 4  # of 16 outputs, that a thread takes at a time
_DEPTH = 64  # inputs of a tile
_WORDS = _DEPTH // 4
_X, _WEIGHTS = 4, 6  # tiles: sums in 0..3, two of each of these


def rows_in_tiles(target: Target, shape: LinearShape, out_dtype: str, act_bits: int):
    """TIR (m, x, weights, offset, out) for any m, as `quantized_rows` takes it for many rows."""
    G, K, N = shape.group_size, shape.K, shape.N
    groups, blocks, planes = shape.groups, shape.blocks, planes_of(act_bits)
    # A group of 32 inputs fills half of a tile, and the rest of its activations are zeros.
    steps = -(-G // _DEPTH)
    quantize = quantize_group(target, G, act_bits)
    load_factors = four_bit_weight(target, shape).factors
    store = store_outputs(out_dtype, N, BLOCK_N)
    configure = amx.configure()
    every = T.ramp(0, 1, BLOCK_N)

    def tile_words(r, g):
        """Where activations of row r go: [tile of rows, group, step, plane, row, word]."""

        def at(plane, k, lanes):
            word = k % _DEPTH // 4
            place = [r // amx.ROWS, g, k // _DEPTH, plane, r % amx.ROWS]
            return [*place, word if lanes == 1 else T.ramp(word, 1, lanes)]

        return at

    @T.inline
    def quantize_row(first, r, x, xq, xscale, xsum, xoffset):
        for g in range(groups):
            at = T.meta_var(tile_words(r, g))
            quantize(x, first + r, g * G, xq, at, xscale, xsum, g, r)
            xoffset[g, r] = T.Cast("float32", xsum[g, r]) * xscale[g, r]
            if G < _DEPTH:
                for p in T.unroll(planes):
                    for word in T.vectorized(_WORDS - G // 4):
                        xq[r // amx.ROWS, g, 0, p, r % amx.ROWS, G // 4 + word] = 0

    @T.inline
    def unpack(first_block, qweight, unpacked):
        for n in range(BLOCKS):
            b = T.meta_var(T.min(first_block + n, blocks - 1))
            for word in range(K // PACK):
                for half in T.unroll(2):
                    unpacked[n, 2 * word + half, every] = nibbles(
                        qweight[b, word, every], half, BLOCK_N
                    )

    @T.inline
    def multiply_group(tile, g, pair, xq, unpacked, sums):
        for i in T.unroll(2 * planes):
            T.evaluate(amx.zero(i))
        for step in T.unroll(steps):
            for p in T.unroll(planes):
                T.evaluate(amx.load(_X + p, T.address_of(xq[tile, g, step, p, 0, 0]), 4 * _WORDS))
            for n in T.unroll(2):
                row = T.meta_var(g * (G // 4) + step * _WORDS)
                address = T.meta_var(T.address_of(unpacked[2 * pair + n, row, 0]))
                T.evaluate(amx.load(_WEIGHTS + n, address, 4 * BLOCK_N))
            for p in T.unroll(planes):
                for n in T.unroll(2):
                    T.evaluate(amx.dot_int8(2 * p + n, _X + p, _WEIGHTS + n, "su"))
        for p in T.unroll(planes):
            for n in T.unroll(2):
                T.evaluate(amx.store(2 * p + n, T.address_of(sums[p, n, 0, 0]), 4 * BLOCK_N))

    @T.inline
    def prefetch_next(r0, g, line, pair, row, xq, unpacked):
        """Part of the tiles that come next, to the nearest cache: a row of tiles of activations (64
        lines, of which each pair of blocks and row asks for two), and the next group's weights,
        that all tiles of rows of a panel ask for together.
        """
        ends = T.meta_var(line == PANEL - amx.ROWS)
        tile = T.meta_var(
            T.Select(ends, T.truncdiv(r0, amx.ROWS), T.truncdiv(r0 + line, amx.ROWS) + 1)
        )
        for i in T.unroll(2):
            at = T.meta_var(pair * 2 * amx.ROWS + row * 2 + i)
            T.evaluate(asked_for(xq[tile, T.Select(ends, g + 1, g), 0, 0, at, 0]))
        n = T.meta_var(T.truncdiv(line, amx.ROWS))
        at = T.meta_var((g + 1) * (G // 4) + pair * amx.ROWS + row)
        T.evaluate(asked_for(unpacked[n, at, 0]))

    @T.inline
    def finish_group(
        r0, g, pair, xscale, xoffset, zero_scale, scale, sums, total, line, xq, unpacked
    ):
        for row in range(amx.ROWS):
            prefetch_next(r0, g, line, pair, row, xq, unpacked)
            for n in T.unroll(2):
                column = T.meta_var(T.ramp((2 * pair + n) * BLOCK_N, 1, BLOCK_N))
                t = T.meta_var(T.broadcast(xscale[g, r0 + line + row], BLOCK_N))
                v = T.meta_var(T.broadcast(xoffset[g, r0 + line + row], BLOCK_N))
                total[line + row, column] = (
                    total[line + row, column]
                    + _dots(planes, sums, n, row) * (scale[column] * t)
                    - zero_scale[column] * v
                )

    @T.inline
    def panel(
        first, r0, height, first_block,
        xq, xscale, xoffset, weights, unpacked, offset, out,
    ):  # fmt: skip
        sums = T.alloc_buffer((planes, 2, amx.ROWS, BLOCK_N), "int32")
        total = T.alloc_buffer((PANEL, BLOCKS * BLOCK_N), "float32")
        scale = T.alloc_buffer((BLOCKS * BLOCK_N,), "float32")
        zero = T.alloc_buffer((BLOCKS * BLOCK_N,), "int32")
        zero_scale = T.alloc_buffer((BLOCKS * BLOCK_N,), "float32")
        for line in range(PANEL):
            for j in T.vectorized(BLOCKS * BLOCK_N):
                total[line, j] = T.float32(0)
        for g in range(groups):
            for n in T.unroll(BLOCKS):
                b = T.meta_var(T.min(first_block + n, blocks - 1))
                load_factors(weights, b, g, 0, zero, scale, n * BLOCK_N)
            for j in T.vectorized(BLOCKS * BLOCK_N):
                zero_scale[j] = T.Cast("float32", zero[j]) * scale[j]
            for tile in range(PANEL // amx.ROWS):
                line = T.meta_var(tile * amx.ROWS)
                if r0 + line < height:
                    for pair in range(BLOCKS // 2):
                        multiply_group(r0 // amx.ROWS + tile, g, pair, xq, unpacked, sums)
                        finish_group(
                            r0,
                            g,
                            pair,
                            xscale,
                            xoffset,
                            zero_scale,
                            scale,
                            sums,
                            total,
                            line,
                            xq,
                            unpacked,
                        )
        for line in range(T.min(height - r0, PANEL)):
            for n in range(BLOCKS):
                if first_block + n < blocks:
                    column = T.meta_var((first_block + n) * BLOCK_N)
                    store(total, line, n * BLOCK_N, first + r0 + line, column, offset, out)

    @T.inline
    def multiply(m, x, weights, offset, out):
        xq = T.alloc_buffer((CHUNK // amx.ROWS, groups, steps, planes, amx.ROWS, _WORDS), "int32")
        xscale = T.alloc_buffer((groups, CHUNK), "float32")
        xsum = T.alloc_buffer((groups, CHUNK), "int32")
        xoffset = T.alloc_buffer((groups, CHUNK), "float32")
        for chunk in range(T.ceildiv(m, CHUNK)):
            first: T.let[T.int64] = chunk * CHUNK
            height: T.let[T.int64] = T.min(m - first, T.int64(CHUNK))
            for r in T.parallel(height):
                quantize_row(first, r, x, xq, xscale, xsum, xoffset)
            for g in range(groups):
                # Rows that fill up the last tile are never stored, but denormal numbers that lie
                # there by chance would make each of their products take a hundred times as long.
                for r in range(T.ceildiv(height, amx.ROWS) * amx.ROWS - height):
                    xscale[g, height + r] = T.float32(0)
                    xoffset[g, height + r] = T.float32(0)
            for part in T.parallel(-(-blocks // BLOCKS)):
                configuration = T.alloc_buffer((16,), "int32")
                unpacked = T.alloc_buffer((BLOCKS, K // 4 + _WORDS, BLOCK_N), "int32")
                configure(configuration)
                unpack(part * BLOCKS, weights[0], unpacked)
                for i in range(T.ceildiv(height, PANEL)):
                    panel(
                        first, i * PANEL, height, part * BLOCKS,
                        xq, xscale, xoffset, weights, unpacked, offset, out,
                    )  # fmt: skip
                T.evaluate(amx.release())

    return multiply


def _dots(planes, sums, n, row):
    """The dot products of a row with the outputs of a block, of all planes, in fp32."""
    at = T.ramp(0, 1, BLOCK_N)
    dots = sums[0, n, row, at]
    if planes == 2:
        dots = T.shift_left(dots, T.broadcast(T.int32(8), BLOCK_N)) + sums[1, n, row, at]
    return T.Cast(f"float32x{BLOCK_N}", dots)
