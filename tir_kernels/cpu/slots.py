"""What the KV cache keeps of a token for one head, its keys or its values: a slot.

As they are, or in 8 bits: a signed byte each and one scale in fp32, a little more than half of the
memory to keep and to read. In a page, the bytes of all slots come first, in whole cache lines, and
then their scales, so that attention applies sixteen of them at once, to scores and to weights.

These bytes lie in a tensor of the type that attention computes with, because TVM's cache has one
type for what it keeps and what it is handed. So it takes a slot for a head of fewer elements, and
queries and outputs for as many of those heads as have room for them; kernels see the real ones in
the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.activations import quantize_group
from tir_kernels.cpu.quantized_rows import row_words

PAGE = 16  # tokens in a page of the cache
INT8 = "int8"
_WORD = 4  # bytes of a scale, and of as many integers
_LEAST = 12  # of head_dim; of fewer, what the cache takes for heads is more than there is


@dataclass(frozen=True)
class Slots:
    """dtype: of what attention computes with. stored: None, as they are, or INT8. Sizes and places
    are in elements of `dtype`. Raises NotImplementedError for heads that have no room for the
    scale, or do not fill words.
    """

    head_dim: int
    dtype: str
    stored: str | None = None

    def __post_init__(self) -> None:
        if self.stored is not None and (self.head_dim % _WORD or self.head_dim < _LEAST):
            raise NotImplementedError(
                f"keys and values in {self.stored} are for heads of {_LEAST} elements or more, in "
                f"fours, and these have {self.head_dim}"
            )

    @property
    def packed(self) -> int:
        """Of a slot, without its scale."""
        return self.head_dim if self.stored is None else self.head_dim // _WORD * self._per_word

    @property
    def scale_size(self) -> int:
        return 0 if self.stored is None else self._per_word

    @property
    def size(self) -> int:
        return self.packed + self.scale_size

    @property
    def nbytes(self) -> int:
        return self.size * _WORD // self._per_word

    def heads(self, count: int) -> int:
        """Heads of `size` elements that `count` heads of head_dim fit into."""
        return -(-count * self.head_dim // self.size)

    def scale_in_page(self, slot: Any) -> Any:
        """Where a slot's scale is in its page's PAGE * size elements of a head; its numbers are at
        slot * packed.
        """
        return PAGE * self.packed + slot * self.scale_size

    def unscaled(self, cell: Callable[[Any], Any], start: Any, first: Any, lanes: int) -> Any:
        """`lanes` numbers of a slot from the `first` on, as fp32 vector, without the scale.

        cell(at): the tensor's elements at indices; start: where the slot is.
        """
        at = start + first // _WORD * self._per_word if self.stored else start + first
        numbers = cell(_span(at, lanes * self.packed // self.head_dim))
        if self.stored is not None:
            numbers = T.reinterpret(f"int8x{lanes}", numbers)
        return T.Cast(f"float32x{lanes}", numbers)

    def scales(self, cell: Callable[[Any], Any], at: Any, count: int) -> Any:
        """`count` scales that lie side by side, as fp32."""
        dtype = "float32" if count == 1 else f"float32x{count}"
        return T.reinterpret(dtype, cell(_span(at, count * self._per_word)))

    def read(
        self, cell: Callable[[Any], Any], start: Any, scale: Any, first: Any, lanes: int
    ) -> Any:
        """As `unscaled`, with the scale that is at `scale`. In `dtype` where nothing is rounded."""
        if self.stored is None:
            return cell(T.ramp(start + first, 1, lanes))
        factor = T.broadcast(self.scales(cell, scale, 1), lanes)
        return self.unscaled(cell, start, first, lanes) * factor

    def fill(self, target: Target) -> Any:
        """TIR (x, row, first, out, i, h): slot out[i, h], numbers before scale, becomes
        x[row, first: first + head_dim], which is in `dtype`.
        """
        d = self.head_dim
        quantize = quantize_group(target, d, 8)

        @T.inline
        def copy(x, row, first, out, i, h):
            for j in T.vectorized(d):
                out[i, h, j] = x[row, first + j]

        @T.inline
        def fill_int8(x, row, first, out, i, h):
            words = T.alloc_buffer((1, 1, d // _WORD), "int32")
            scale = T.alloc_buffer((1, 1), "float32")
            total = T.alloc_buffer((1, 1), "int32")
            at = T.meta_var(row_words(0, 0))
            quantize(x, row, first, words, at, scale, total, 0, 0)
            for j in range(d // _WORD):
                out[i, h, self._word(j)] = self._elements(words[0, 0, j])
            out[i, h, self._word(d // _WORD)] = self._elements(scale[0, 0])

        return copy if self.stored is None else fill_int8

    @property
    def _per_word(self) -> int:
        """Elements in a word."""
        return 32 // int(self.dtype[-2:])

    def _word(self, i: Any) -> Any:
        return _span(i * self._per_word, self._per_word)

    def _elements(self, word: Any) -> Any:
        lanes = f"x{self._per_word}" if self._per_word > 1 else ""
        return T.reinterpret(self.dtype + lanes, word)


def _span(first: Any, count: int) -> Any:
    return first if count == 1 else T.ramp(first, 1, count)
