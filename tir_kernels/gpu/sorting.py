"""Sorting rows of probabilities on a GPU: a bitonic network (Batcher 1968) for rows of any length.

Every comparison of the network puts the more probable token first, so what would lie beyond a row's
end counts as less than everything and never has to move: a row need not be padded.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS
from tir_kernels.memo import memoized

_TILE_BITS = 10
TILE = 1 << _TILE_BITS  # elements that a block sorts in shared memory: 8 KiB with their tokens
_PAIRS = TILE // 2 // THREADS  # that a thread compares in one step
_MERGES = 12  # of runs longer than a tile: enough for rows of 4 million
_NOBODY = 2**31 - 1  # the token beyond a row's end


@memoized
def argsort_probs(target: Target) -> PrimFunc:
    """(probabilities [b, V], sorted probabilities [b, V], their tokens int32 [b, V]).

    The most probable token comes first; of equals, the one with the smaller number.
    """

    def doublings(length):
        """How often a tile is doubled until it holds a row. An `if` around the kernels would be
        simpler, but TVM puts no barriers into what stands in one.
        """
        return sum(T.Cast("int32", (TILE << m) < length) for m in range(_MERGES))

    @T.inline
    def order(values, tokens, row, i, j):
        """Put what belongs first of two elements of a row at i."""
        value = T.alloc_buffer((2,), "float32", scope="local")
        token = T.alloc_buffer((2,), "int32", scope="local")
        value[0] = values[row, i]
        value[1] = values[row, j]
        token[0] = tokens[row, i]
        token[1] = tokens[row, j]
        if value[1] > value[0] or (value[1] == value[0] and token[1] < token[0]):
            values[row, i] = value[1]
            values[row, j] = value[0]
            tokens[row, i] = token[1]
            tokens[row, j] = token[0]

    @T.inline
    def step(values, tokens, half, mirrored, t):
        """In a tile, compare the halves of runs of 2 * half elements: each with its mirror image
        where both are sorted, later with the element half a run on.
        """
        T.tvm_storage_sync("shared")
        for p in range(_PAIRS):
            pair = T.meta_var(p * THREADS + t)
            start = T.meta_var(T.truncdiv(pair, half) * (2 * half))
            place = T.meta_var(T.truncmod(pair, half))
            if mirrored:
                order(values, tokens, 0, start + place, start + 2 * half - 1 - place)
            else:
                order(values, tokens, 0, start + place, start + place + half)

    @T.inline
    def store(values, tokens, b, tile, vocab, t, out, out_tokens):
        T.tvm_storage_sync("shared")
        for p in range(2 * _PAIRS):
            e = T.meta_var(p * THREADS + t)
            if tile * TILE + e < vocab:
                out[b, tile * TILE + e] = values[0, e]
                out_tokens[b, tile * TILE + e] = tokens[0, e]

    @T.prim_func(private=True, s_tir=True)
    def argsort(source_handle: T.handle, out_handle: T.handle, tokens_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        source = T.match_buffer(source_handle, (batch, vocab), "float32")
        out = T.match_buffer(out_handle, (batch, vocab), "float32")
        out_tokens = T.match_buffer(tokens_handle, (batch, vocab), "int32")
        tiles = T.meta_var(T.truncdiv(vocab + (TILE - 1), TILE))
        # Tiles by themselves.
        for b in T.thread_binding(batch, thread="blockIdx.y"):
            for tile in T.thread_binding(tiles, thread="blockIdx.x"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    values = T.alloc_buffer((1, TILE), "float32", scope="shared")
                    tokens = T.alloc_buffer((1, TILE), "int32", scope="shared")
                    for p in range(2 * _PAIRS):
                        e = T.meta_var(p * THREADS + t)
                        values[0, e] = T.min_value("float32")
                        tokens[0, e] = _NOBODY
                        if tile * TILE + e < vocab:
                            values[0, e] = source[b, tile * TILE + e]
                            tokens[0, e] = tile * TILE + e
                    for k in range(_TILE_BITS):
                        step(values, tokens, T.shift_left(1, k), True, t)
                        for s in range(k):
                            step(values, tokens, T.shift_left(1, k - 1 - s), False, t)
                    store(values, tokens, b, tile, vocab, t, out, out_tokens)
        # Runs of twice the length, until one is the row.
        for m in range(doublings(vocab)):
            run = T.meta_var(T.shift_left(TILE, m))
            for b in T.thread_binding(batch, thread="blockIdx.y"):
                for block in T.thread_binding(tiles, thread="blockIdx.x"):
                    for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                        for p in range(2 * _PAIRS):
                            e = T.meta_var(block * TILE + p * THREADS + t)
                            place = T.meta_var(T.truncmod(e, 2 * run))
                            image = T.meta_var(e - place + 2 * run - 1 - place)
                            if place < run and image < vocab:
                                order(out, out_tokens, b, e, image)
            for s in range(m):
                half = T.meta_var(T.shift_left(TILE, m - 1 - s))
                for b in T.thread_binding(batch, thread="blockIdx.y"):
                    for block in T.thread_binding(tiles, thread="blockIdx.x"):
                        for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                            for p in range(2 * _PAIRS):
                                e = T.meta_var(block * TILE + p * THREADS + t)
                                place = T.meta_var(T.truncmod(e, 2 * half))
                                if place < half and e + half < vocab:
                                    order(out, out_tokens, b, e, e + half)
            for b in T.thread_binding(batch, thread="blockIdx.y"):
                for tile in T.thread_binding(tiles, thread="blockIdx.x"):
                    for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                        values = T.alloc_buffer((1, TILE), "float32", scope="shared")
                        tokens = T.alloc_buffer((1, TILE), "int32", scope="shared")
                        for p in range(2 * _PAIRS):
                            e = T.meta_var(p * THREADS + t)
                            values[0, e] = T.min_value("float32")
                            tokens[0, e] = _NOBODY
                            if tile * TILE + e < vocab:
                                values[0, e] = out[b, tile * TILE + e]
                                tokens[0, e] = out_tokens[b, tile * TILE + e]
                        for s in range(_TILE_BITS):
                            half = T.meta_var(T.shift_left(1, _TILE_BITS - 1 - s))
                            step(values, tokens, half, False, t)
                        store(values, tokens, b, tile, vocab, t, out, out_tokens)

    return argsort
