"""Many rows against the blocked layout with AMX: 16 rows by 16 outputs by 64 inputs an instruction.

A thread unpacks the weights of a few blocks once, into the tiles that AMX multiplies with, and goes
through all rows with them, a group of inputs at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tir_kernels._tvm import T, Target
from tir_kernels.cpu import amx
from tir_kernels.cpu.activations import planes_of, quantize_group
from tir_kernels.cpu.blocked_weight import four_bit_weight, nibbles, store_outputs
from tir_kernels.cpu.prefetching import asked_for
from tir_kernels.layouts import BLOCK_N, PACK, LinearShape

CHUNK = 512  # rows that are quantized at a time
_DEPTH = 64  # inputs of a tile
_WORDS = _DEPTH // 4
_R = amx.ROWS
_X, _WEIGHTS = 4, 6  # tiles: sums in 0..3, two of each of these


class _Work(NamedTuple):
    """The buffers of a thread that goes through all rows with its blocks."""

    xq: Any
    xscale: Any
    xoffset: Any
    unpacked: Any
    dots: Any  # of two units by turns
    scale: Any  # of two groups by turns, as is zero_scale
    zero_scale: Any
    total: Any


class _Unit(NamedTuple):
    """What AMX's tiles of sums hold at a time: a tile of rows, a pair of blocks, a group."""

    tile: Any
    pair: Any
    g: Any


def blocks_at_a_time(blocks: int) -> int:
    """Of 16 outputs each, for a thread: more of them read the activations, which the second cache
    does not hold, less often, and fewer leave work for more threads.
    """
    return 8 if blocks >= 128 else 4


def rows_in_tiles(target: Target, shape: LinearShape, out_dtype: str, act_bits: int):
    """TIR (m, x, weights, offset, out) for any m, as `quantized_rows` takes it for many rows."""
    G, K, N = shape.group_size, shape.K, shape.N
    groups, blocks, planes = shape.groups, shape.blocks, planes_of(act_bits)
    # A group of 32 inputs fills half of a tile, and the rest of its activations are zeros.
    steps = -(-G // _DEPTH)
    taken = blocks_at_a_time(blocks)
    pairs, width = taken // 2, taken * BLOCK_N
    between = -(-_R // (2 * steps * planes))  # rows that are finished after each instruction
    ahead = -(-steps * planes // pairs)  # lines of activations that are asked for with each row
    quantize = quantize_group(target, G, act_bits)
    load_factors = four_bit_weight(target, shape).factors
    store = store_outputs(out_dtype, N, BLOCK_N)
    configure = amx.configure()
    every = T.ramp(0, 1, BLOCK_N)

    def tile_words(r, g):
        """Where activations of row r go: [tile of rows, group, step, plane, row, word]."""

        def at(plane, k, lanes):
            word = k % _DEPTH // 4
            place = [r // _R, g, k // _DEPTH, plane, r % _R]
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
                        xq[r // _R, g, 0, p, r % _R, G // 4 + word] = 0

    @T.inline
    def unpack(first_block, qweight, unpacked):
        for n in range(taken):
            b = T.meta_var(T.min(first_block + n, blocks - 1))
            for word in range(K // PACK):
                for half in T.unroll(2):
                    unpacked[n, 2 * word + half, every] = nibbles(
                        qweight[b, word, every], half, BLOCK_N
                    )

    def factors_of(g):
        """Where the factors of a group are, of those of two groups."""
        return g % 2 * width

    def unit_before(unit, tiles):
        """Pairs follow each other, then tiles of rows, then groups."""
        tile, pair, g = unit
        new_tile = pair == 0
        new_group = T.And(new_tile, tile == 0)
        return _Unit(
            T.Select(new_group, tiles - 1, T.Select(new_tile, tile - 1, tile)),
            (pair + pairs - 1) % pairs,
            T.Select(new_group, g - 1, g),
        )

    @T.inline
    def prefetch_next(work, unit, tiles, row):
        """A part of the row of tiles of activations that comes next, to the nearest cache."""
        ends = T.meta_var(unit.tile == tiles - 1)
        tile = T.meta_var(T.Select(ends, T.int64(0), unit.tile + 1))
        g = T.meta_var(T.Select(ends, unit.g + 1, unit.g))
        for i in T.unroll(ahead):
            line = T.meta_var((unit.pair * _R + row) * ahead + i)
            T.evaluate(asked_for(work.xq[tile, g, 0, 0, line, 0]))

    @T.inline
    def finish_row(work, unit, row):
        line = T.meta_var(unit.tile * _R + row)
        t = T.meta_var(T.broadcast(work.xscale[T.max(unit.g, 0), line], BLOCK_N))
        v = T.meta_var(T.broadcast(work.xoffset[T.max(unit.g, 0), line], BLOCK_N))
        for n in T.unroll(2):
            dots = T.meta_var(_dots(work.dots, unit.pair % 2, planes, n, row))
            at = T.meta_var((2 * unit.pair + n) * BLOCK_N)
            column = T.meta_var(T.ramp(at, 1, BLOCK_N))
            factors = T.meta_var(T.ramp(factors_of(unit.g) + at, 1, BLOCK_N))
            work.total[line, column] = (
                work.total[line, column]
                + dots * (work.scale[factors] * t)
                - work.zero_scale[factors] * v
            )

    @T.inline
    def multiply_unit(work, unit, before, tiles):
        """The dot products of a tile of rows with a pair of blocks and, between them, row by row,
        what is to be done with those of the unit before: AMX takes 16 cycles an instruction, and a
        processor looks only so far ahead for work that need not wait.
        """
        for i in T.unroll(2 * planes):
            T.evaluate(amx.zero(i))
        for step in T.unroll(steps):
            for p in T.unroll(planes):
                x = T.meta_var(T.address_of(work.xq[unit.tile, unit.g, step, p, 0, 0]))
                T.evaluate(amx.load(_X + p, x, 4 * _WORDS))
            for n in T.unroll(2):
                word = T.meta_var(unit.g * (G // 4) + step * _WORDS)
                address = T.meta_var(T.address_of(work.unpacked[2 * unit.pair + n, word, 0]))
                T.evaluate(amx.load(_WEIGHTS + n, address, 4 * BLOCK_N))
            for p in T.unroll(planes):
                for n in T.unroll(2):
                    T.evaluate(amx.dot_int8(2 * p + n, _X + p, _WEIGHTS + n, "su"))
                    for i in T.unroll(between):
                        row = T.meta_var(((step * planes + p) * 2 + n) * between + i)
                        if row < _R:
                            prefetch_next(work, unit, tiles, row)
                            finish_row(work, before, row)
        for p in T.unroll(planes):
            for n in T.unroll(2):
                dots = T.meta_var(T.address_of(work.dots[unit.pair % 2, p, n, 0, 0]))
                T.evaluate(amx.store(2 * p + n, dots, 4 * BLOCK_N))

    @T.inline
    def multiply_blocks(first, height, first_block, xq, xscale, xoffset, weights, offset, out):
        unpacked = T.alloc_buffer((taken, K // 4 + _WORDS, BLOCK_N), "int32")
        dots = T.alloc_buffer((2, planes, 2, _R, BLOCK_N), "int32")
        total = T.alloc_buffer((CHUNK, width), "float32")
        zero = T.alloc_buffer((2 * width,), "int32")
        scale = T.alloc_buffer((2 * width,), "float32")
        zero_scale = T.alloc_buffer((2 * width,), "float32")
        work = T.meta_var(_Work(xq, xscale, xoffset, unpacked, dots, scale, zero_scale, total))
        tiles: T.let[T.int64] = T.ceildiv(height, _R)
        unpack(first_block, weights[0], unpacked)
        for line in range(tiles * _R):
            for j in T.vectorized(width):
                total[line, j] = T.float32(0)
        for j in T.vectorized(width):
            # The unit before the first is of group -1: zeros times what lies in `dots`.
            scale[factors_of(-1) + j] = T.float32(0)
            zero_scale[factors_of(-1) + j] = T.float32(0)
        for g in range(groups):
            for n in T.unroll(taken):
                b = T.meta_var(T.min(first_block + n, blocks - 1))
                load_factors(weights, b, g, 0, zero, scale, factors_of(g) + n * BLOCK_N)
            for j in T.vectorized(width):
                at = T.meta_var(factors_of(g) + j)
                zero_scale[at] = T.Cast("float32", zero[at]) * scale[at]
            for tile in range(tiles):
                for pair in T.unroll(pairs):
                    unit = T.meta_var(_Unit(tile, pair, g))
                    multiply_unit(work, unit, unit_before(unit, tiles), tiles)
        last = T.meta_var(_Unit(tiles - 1, pairs - 1, groups - 1))
        for row in range(_R):
            finish_row(work, last, row)
        for line in range(height):
            for n in T.unroll(taken):
                if first_block + n < blocks:
                    column = T.meta_var((first_block + n) * BLOCK_N)
                    store(total, line, n * BLOCK_N, first + line, column, offset, out)

    @T.inline
    def multiply(m, x, weights, offset, out):
        xq = T.alloc_buffer((CHUNK // _R, groups, steps, planes, _R, _WORDS), "int32")
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
                for r in range(T.ceildiv(height, _R) * _R - height):
                    xscale[g, height + r] = T.float32(0)
                    xoffset[g, height + r] = T.float32(0)
            for part in T.parallel(-(-blocks // taken)):
                configuration = T.alloc_buffer((16,), "int32")
                configure(configuration)
                multiply_blocks(
                    first, height, part * taken, xq, xscale, xoffset, weights, offset, out
                )
                T.evaluate(amx.release())

    return multiply


def _dots(dots, slot, planes, n, row):
    """The dot products of a row with the outputs of a block, of all planes, in fp32."""
    at = T.ramp(0, 1, BLOCK_N)
    total = dots[slot, 0, n, row, at]
    if planes == 2:
        total = T.shift_left(total, T.broadcast(T.int32(8), BLOCK_N)) + dots[slot, 1, n, row, at]
    return T.Cast(f"float32x{BLOCK_N}", total)
