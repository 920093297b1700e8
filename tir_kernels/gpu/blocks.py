"""What kernels of thread blocks have in common: their size, their vectors, their sums.

Nothing here counts on a warp: sums go through shared memory, with two barriers for any block. All
shapes hold for WebGPU's least limits too: 256 threads and 16 KiB of shared memory in a block, no
third grid axis, and 65,535 blocks along an axis, so rows of a batch are the first axis and never a
factor of another.

Tensors are read and written as vectors through views (`vector_view`), because WGSL has no other way
to say that. What a thread has of them is a flat local buffer, of which `at` names one vector; one
that is written in vectors and read element by element, or the other way round, stays in registers
as vectors too.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T, Target

THREADS = 256  # in a block at most
SHARED_BYTES = 16384  # that a block may use
_ROWS = 16  # partial sums of the second step
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def bytes_of(dtype: str) -> int:
    """Size of one element."""
    return _BYTES[dtype]


def vector_width(target: Target, size: int, dtype: str) -> int:
    """Elements of the widest load, of 16 bytes at most, that walks rows of `size` without a tail.

    WGSL has no vectors of more than four elements.
    """
    widest = 16 // bytes_of(dtype)
    if target.kind.name != "cuda":
        widest = min(widest, 4)
    while size % widest:
        widest //= 2
    return widest


def vector_type(dtype: str, vec: int) -> str:
    """TVM's name of a vector of `vec` elements."""
    return dtype if vec == 1 else f"{dtype}x{vec}"


def vector_view(buffer: Any, dtype: str, vec: int) -> Any:
    """A buffer as vectors along its last axis; to be declared before threads are bound.

    Two views of one buffer would be bound twice, which WebGPU forbids where one is written.
    """
    shape = (*buffer.shape[:-1], buffer.shape[-1] // vec)
    first = buffer[tuple(0 for _ in shape)]
    return T.decl_buffer(shape, vector_type(dtype, vec), data=T.address_of(first))


def at(first: Any, vec: int) -> Any:
    """The index of `vec` elements of a flat buffer from `first` on."""
    return first if vec == 1 else T.ramp(first, 1, vec)


def threads_for(work: int, most: int = THREADS) -> int:
    """Threads of a block with `work` equal pieces: a multiple of 32 up to `most`."""
    return min(most, -(-work // 32) * 32)


def block_sum(threads: int):
    """TIR that sums one fp32 value of each thread; all threads get the sum.

    It is called with the value, the thread, two shared buffers [threads] and [16], and a local
    buffer whose element 0 receives the sum. A second use needs a barrier after the first.
    """
    return _block_reduction(threads, lambda a, b: a + b)


def block_max(threads: int):
    """As `block_sum`, for the largest value."""
    return _block_reduction(threads, T.max)


def _block_reduction(threads: int, combine):
    run = threads // _ROWS

    @T.inline
    def reduce(value, thread, partial, rows, result):
        partial[thread] = value
        T.tvm_storage_sync("shared")
        if thread < _ROWS:
            rows[thread] = partial[thread * run]
            for i in range(1, run):
                rows[thread] = combine(rows[thread], partial[thread * run + i])
        T.tvm_storage_sync("shared")
        result[0] = rows[0]
        for i in range(1, _ROWS):
            result[0] = combine(result[0], rows[i])

    return reduce
