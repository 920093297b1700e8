"""What the KV cache keeps of a token for one head, its keys or its values: a slot.

As they are, or in 8 bits: a signed byte each and, behind them, a scale in fp32 for every group of
up to 32, which is half the memory to keep and to read. The bytes lie in a tensor of the type that
TVM's cache computes with, because there it has one type for what it keeps and what it is handed.
So the cache takes a slot for a head of fewer elements, and queries and outputs for as many of those
heads as have room for them; kernels see the real ones in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.activations import quantize_group
from tir_kernels.cpu.quantized_rows import row_words

INT8 = "int8"
_GROUP = 32  # elements that share a scale, where head_dim is a multiple of it
_WORD = 4  # bytes of a scale, and of as many integers


@dataclass(frozen=True)
class Slots:
    """dtype: of what attention computes with. stored: None, as they are, or INT8, for which
    head_dim has to be a multiple of 4.
    """

    head_dim: int
    dtype: str
    stored: str | None = None

    @property
    def group(self) -> int:
        return math.gcd(_GROUP, self.head_dim)

    @property
    def size(self) -> int:
        """Elements of `dtype`."""
        if self.stored is None:
            return self.head_dim
        return self._words * self._per_word

    @property
    def nbytes(self) -> int:
        return self.size * int(self.dtype[-2:]) // 8

    def heads(self, count: int) -> int:
        """Heads of `size` elements that `count` heads of head_dim fit into."""
        return -(-count * self.head_dim // self.size)

    def read(self, slot: Callable[[Any], Any], first: Any, lanes: int) -> Any:
        """`lanes` elements from `first` on, in `dtype` or fp32. They are of one group. slot(at):
        what a slot's tensor has at indices.
        """
        if self.stored is None:
            return slot(T.ramp(first, 1, lanes))
        bytes_ = slot(self._at(first // _WORD, lanes // _WORD))
        scale = slot(self._at(self.head_dim // _WORD + first // self.group))
        integers = T.Cast(f"float32x{lanes}", T.reinterpret(f"int8x{lanes}", bytes_))
        return integers * T.broadcast(T.reinterpret("float32", scale), lanes)

    def fill(self, target: Target) -> Any:
        """TIR (x, row, first, out, i, h): slot out[i, h] becomes x[row, first: first + head_dim],
        which is in `dtype`.
        """
        d, group = self.head_dim, self.group
        quantize = quantize_group(target, group, 8)

        @T.inline
        def copy(x, row, first, out, i, h):
            for j in T.vectorized(d):
                out[i, h, j] = x[row, first + j]

        @T.inline
        def fill_int8(x, row, first, out, i, h):
            words = T.alloc_buffer((1, 1, d // _WORD), "int32")
            scales = T.alloc_buffer((1, d // group), "float32")
            sums = T.alloc_buffer((1, d // group), "int32")
            for g in range(d // group):
                at = T.meta_var(row_words(0, g * group))
                quantize(x, row, first + g * group, words, at, scales, sums, 0, g)
            for j in range(d // _WORD):
                out[i, h, self._at(j)] = self._packed(words[0, 0, j])
            for g in range(d // group):
                out[i, h, self._at(d // _WORD + g)] = self._packed(scales[0, g])

        return copy if self.stored is None else fill_int8

    @property
    def _words(self) -> int:
        return self.head_dim // _WORD + self.head_dim // self.group

    @property
    def _per_word(self) -> int:
        """Elements of `dtype` in a word."""
        return 32 // int(self.dtype[-2:])

    def _at(self, word: Any, count: int = 1) -> Any:
        """The elements of a slot's words."""
        count *= self._per_word
        return word if count == 1 else T.ramp(word * self._per_word, 1, count)

    def _packed(self, word: Any) -> Any:
        per_word = self._per_word
        return T.reinterpret(self.dtype + (f"x{per_word}" if per_word > 1 else ""), word)
