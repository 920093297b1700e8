"""The two matrix products of attention by AMX, as accurate as in fp32.

bfloat16 has 8 bits of a number; a second one holds the next 8. Two of them are a float16 exactly
and a softmax's weight to 2^-16. Of the four products of two such pairs, three are summed, in fp32;
the product of the two lower ones is below 2^-16 of the whole.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T, Target, target_has_features
from tir_kernels.cpu import amx
from tir_kernels.cpu.attention_products import TILE, Products, Source
from tir_kernels.cpu.lanes import transpose

_STEP = 32  # keys of one product of tiles, and elements of a head
_L = amx.WORDS
_UPPER = 0xFFFF0000  # the bits of an fp32 that bfloat16 keeps
_BYTES = 4 * _L  # of a row of a tile, which lies in one piece


def has_tiles(target: Target, head_dim: int, dtype: str) -> bool:
    return target_has_features("amx-bf16", target) and dtype == "float16" and head_dim % _STEP == 0


def tiled_products(head_dim: int) -> Products:
    """Products by tiles, for float16 and a head_dim that is a multiple of 32."""
    d = head_dim
    depth = d // _STEP
    every = T.ramp(0, 1, _L)
    half = _L // 2
    turn = transpose(_L)

    @T.inline
    def begin():
        words = T.alloc_buffer((amx.WORDS,), "int32")
        amx.configure()(words)

    @T.inline
    def end():
        T.evaluate(amx.release())

    @T.inline
    def pack_query_words(plane, s, c, k, query, queries):
        upper = T.alloc_buffer((half, _L), "float32")
        lower = T.alloc_buffer((half, _L), "float32")
        for i in T.unroll(half):
            at = T.meta_var(T.ramp(k * _STEP, 1, _STEP))
            upper[i, every] = _neighbours(query(i, at), plane)
            lower[i, every] = _neighbours(query(half + i, at), plane)
        turn(upper, lower)
        for i in T.unroll(half):
            queries[s, plane, c, k, i, every] = upper[i, every]
            queries[s, plane, c, k, half + i, every] = lower[i, every]

    @T.inline
    def pack_queries(s, c, query, queries):
        for k in range(depth):
            pack_query_words(0, s, c, k, query, queries)
            pack_query_words(1, s, c, k, query, queries)

    @T.inline
    def pack_key_rows(t, width, key, keys):
        place: T.let[T.int32] = key.place(T.min(t, width - 1))
        for i in range(amx.ROWS):
            tile = T.meta_var(T.truncdiv(t, amx.ROWS))
            for k in range(depth):
                if t + i < width:
                    words = T.meta_var(key.read(place, t + i, k * _STEP, _STEP))
                    keys[0, tile, k, i, every] = _neighbours(words, 0)
                    keys[1, tile, k, i, every] = _neighbours(words, 1)
                else:
                    keys[0, tile, k, i, every] = T.broadcast(T.float32(0), _L)
                    keys[1, tile, k, i, every] = T.broadcast(T.float32(0), _L)

    @T.inline
    def pack_keys(t, width, key, keys):
        pack_key_rows(t, width, key, keys)
        pack_key_rows(t + amx.ROWS, width, key, keys)

    @T.inline
    def pair_of_values(t, width, read, plane, x, i):
        """Row i of x: of values t and t + 1, as `read` gives them, side by side."""
        if t + 1 < width:
            x[i, every] = _planes(read(t), read(t + 1), plane)
        else:
            if t < width:
                x[i, every] = _planes(read(t), T.broadcast(T.float32(0), _L), plane)
            else:
                x[i, every] = T.broadcast(T.float32(0), _L)

    @T.inline
    def pack_value_words(plane, t, k, width, value, place, other, values):
        upper = T.alloc_buffer((half, _L), "float32")
        lower = T.alloc_buffer((half, _L), "float32")
        here = T.meta_var(_columns(value, place, k))
        there = T.meta_var(_columns(value, other, k))
        for i in T.unroll(half):
            pair_of_values(t + 2 * i, width, here, plane, upper, i)
            pair_of_values(t + amx.ROWS + 2 * i, width, there, plane, lower, i)
        turn(upper, lower)
        for i in T.unroll(half):
            values[plane, k, T.truncdiv(t, _STEP), i, every] = upper[i, every]
            values[plane, k, T.truncdiv(t, _STEP), half + i, every] = lower[i, every]

    @T.inline
    def pack_values(t, width, value, values):
        place: T.let[T.int32] = value.place(t)
        other: T.let[T.int32] = value.place(T.min(t + amx.ROWS, width - 1))
        for k in range(d // amx.ROWS):
            pack_value_words(0, t, k, width, value, place, other, values)
            pack_value_words(1, t, k, width, value, place, other, values)

    @T.inline
    def multiply():
        """Tiles 0 to 3 += two tiles of a, 4 and 5, times two of b, 6 and 7."""
        amx.dot_bfloat16(0, 4, 6)
        amx.dot_bfloat16(1, 4, 7)
        amx.dot_bfloat16(2, 5, 6)
        amx.dot_bfloat16(3, 5, 7)

    @T.inline
    def multiply_planes(tile_a, tile_b):
        amx.load(4, tile_a(0, 0), _BYTES)
        amx.load(5, tile_a(0, 1), _BYTES)
        amx.load(6, tile_b(1, 0), _BYTES)
        amx.load(7, tile_b(1, 1), _BYTES)
        multiply()
        amx.load(6, tile_b(0, 0), _BYTES)
        amx.load(7, tile_b(0, 1), _BYTES)
        multiply()
        amx.load(4, tile_a(1, 0), _BYTES)
        amx.load(5, tile_a(1, 1), _BYTES)
        multiply()

    def keys_at(keys, pair, k):
        return lambda plane, i: T.address_of(keys[plane, 2 * pair + i, k, 0, 0])

    def queries_at(queries, s, k):
        return lambda plane, c: T.address_of(queries[s, plane, c, k, 0, 0])

    def values_at(values, pair, step):
        return lambda plane, i: T.address_of(values[plane, 2 * pair + i, step, 0, 0])

    def weights_at(weights, step):
        return lambda plane, c: T.address_of(weights[plane, c, step, 0, 0])

    @T.inline
    def store_totals(out, at, first):
        amx.store(0, T.address_of(out[at, first, 0]), 2 * _BYTES)
        amx.store(1, T.address_of(out[at, first, _L]), 2 * _BYTES)
        amx.store(2, T.address_of(out[at, first + amx.ROWS, 0]), 2 * _BYTES)
        amx.store(3, T.address_of(out[at, first + amx.ROWS, _L]), 2 * _BYTES)

    @T.inline
    def score(s, rows, keys, queries, scores):
        for pair in range(T.truncdiv(rows, _STEP)):
            amx.zero(0)
            amx.zero(1)
            amx.zero(2)
            amx.zero(3)
            for k in range(depth):
                multiply_planes(keys_at(keys, pair, k), queries_at(queries, s, k))
            store_totals(scores, 0, pair * _STEP)

    @T.inline
    def pack_weights(t, c, pair, weights):
        step = T.meta_var(T.truncdiv(t, _STEP))
        row = T.meta_var(T.truncmod(T.truncdiv(t, 2), _L))
        weights[0, c, step, row, every] = _planes(pair[0, every], pair[1, every], 0)
        weights[1, c, step, row, every] = _planes(pair[0, every], pair[1, every], 1)

    @T.inline
    def gather(s, rows, values, weights, mixed):
        for pair in range(depth):
            first = T.meta_var(pair * _STEP)
            amx.load(0, T.address_of(mixed[s, first, 0]), 2 * _BYTES)
            amx.load(1, T.address_of(mixed[s, first, _L]), 2 * _BYTES)
            amx.load(2, T.address_of(mixed[s, first + amx.ROWS, 0]), 2 * _BYTES)
            amx.load(3, T.address_of(mixed[s, first + amx.ROWS, _L]), 2 * _BYTES)
            for step in range(T.truncdiv(rows, _STEP)):
                multiply_planes(values_at(values, pair, step), weights_at(weights, step))
            store_totals(mixed, s, first)

    # Each tile lies in one piece: [.., 16, 16] words, two bfloat16 to a word.
    tile = (amx.ROWS, _L)
    return Products(
        lanes=_L,
        step=_STEP,
        queries=lambda strips: ((strips, 2, 2, depth, *tile), "float32"),
        keys=((2, TILE // amx.ROWS, depth, *tile), "float32"),
        values=((2, d // amx.ROWS, TILE // _STEP, *tile), "float32"),
        weights=((2, 2, TILE // _STEP, *tile), "float32"),
        begin=begin,
        end=end,
        pack_queries=pack_queries,
        pack_keys=pack_keys,
        pack_values=pack_values,
        score=score,
        pack_weights=pack_weights,
        gather=gather,
    )


def _columns(value: Source, place: Any, k: Any) -> Any:
    """t -> the k-th 16 elements of value t, in fp32."""
    return lambda t: _wide(value.read(place, t, k * amx.ROWS, amx.ROWS))


def _wide(x: Any) -> Any:
    return T.Cast(f"float32x{_L}", x)


def _neighbours(x: Any, plane: int) -> Any:
    """32 numbers as 16 words of two bfloat16 each."""
    even = T.Shuffle([x], list(range(0, _STEP, 2)))
    odd = T.Shuffle([x], list(range(1, _STEP, 2)))
    return _planes(_wide(even), _wide(odd), plane)


def _planes(low: Any, high: Any, plane: int) -> Any:
    """Words (as fp32) of two bfloat16, of the numbers or of what these leave of them."""
    if plane == 1:
        low, high = (x - _as_float(_and_upper(_bits(x))) for x in (low, high))
    shifted = T.shift_right(_bits(low), T.broadcast(T.uint32(16), _L))
    return _as_float(T.bitwise_or(shifted, _and_upper(_bits(high))))


def _and_upper(bits: Any) -> Any:
    return T.bitwise_and(bits, T.broadcast(T.uint32(_UPPER), _L))


def _bits(x: Any) -> Any:
    return T.reinterpret(f"uint32x{_L}", x)


def _as_float(bits: Any) -> Any:
    return T.reinterpret(f"float32x{_L}", bits)
