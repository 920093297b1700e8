"""What the attention kernels share: constants of the softmax, and reading keys in pages."""

import math

from tir_kernels._tvm import T, Target
from tir_kernels.gpu.pages import PAGE

NOTHING = -5e4  # the running maximum before any key, as in TVM's own kernels
HIDDEN = -1e30  # the score of a key that a query must not see
TINY = 1e-30  # keeps a sum over no keys from being divided by
LOG2_E = math.log2(math.e)
_PAGE_BITS = PAGE.bit_length() - 1


def in_rows(x, first, head):
    """Vector v of token t in rows of a view of [n, heads, d] that begin at `first`."""
    return lambda t, v: x[first + t, head, v]


def in_pages(target: Target, pages, page_values, begin, which, head):
    """Vector v of token t in a view of a sequence's pages; which: 0 for keys, 1 for values."""

    def vector(t, v):
        page = page_values[begin + T.shift_right(t, _PAGE_BITS)]
        # A large cache has more than 2^31 elements; WGSL has no wider integers, and no buffers
        # as large either.
        if target.kind.name == "cuda":
            page = T.Cast("int64", page)
        return pages[page, which, head, T.bitwise_and(t, PAGE - 1), v]

    return vector
