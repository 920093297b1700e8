"""Memory that weights lie in: files mapped as they are, or one buffer of huge pages.

A mapped file is the system's page cache: nothing is copied, processes share it, and it can be
taken back and read again. It comes in pages of 4 KB, whose addresses take the processor so long to
look up that a decoder reads them at 70 to 80 % of the speed of huge pages (2 MB). Those are given
out for anonymous memory only.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_HUGE_PAGE = 2**21
_PIECE = 2**24  # bytes that one thread reads at a time
_NICENESS = 10  # a tenth of the time that others get, where all want it
_ADVICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_huge_pages(advice: Path = _ADVICE) -> bool:
    """Whether the system gives huge pages to who asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in advice.read_text()
    except OSError:
        return False


def new_buffer(nbytes: int) -> np.ndarray:
    """Zeros, uint8 [nbytes], in huge pages where those are to be had; pages that are not touched
    take no memory. Raises MemoryError.
    """
    size = -(-max(nbytes, 1) // _HUGE_PAGE) * _HUGE_PAGE
    # Python's default is memory to be shared with children, which comes in small pages.
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    try:
        memory = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes cannot be allocated") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


class MappedFile:
    """An open file: its bytes in memory (`data`, uint8), which the system reads in the background.

    What takes the file's name later on changes neither `data` nor what `read` gives. Raises
    OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("rb", buffering=0)
        # Writable, since DLPack hands on nothing else; what is written is the process's own.
        self._memory = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_WILLNEED"):
            self._memory.madvise(mmap.MADV_WILLNEED)
        self.data = np.frombuffer(self._memory, np.uint8)

    def read(self, offset: int, into: np.ndarray) -> None:
        """Bytes from `offset` on, to `into` (uint8). Raises OSError where the file ends before."""
        if not hasattr(os, "preadv"):
            into[:] = self.data[offset : offset + into.size]
            return
        left = memoryview(into.data)
        while left:
            count = os.preadv(self._stream.fileno(), [left], offset)
            if not count:
                raise OSError(0, "ends too early", str(self.path))
            offset, left = offset + count, left[count:]

    def release(self, offset: int, nbytes: int) -> None:
        """Take bytes of `data` out of this process's memory, until somebody reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)


@dataclass(frozen=True)
class Reading:
    """Bytes of a file from `offset` on, and the memory (uint8) that they go to."""

    file: MappedFile
    offset: int
    into: np.ndarray


def read_all(readings: Iterable[Reading], threads: int) -> None:
    """Read in parallel; what has been read leaves the files' `data`, so that it is not in memory
    twice. Raises OSError, also for a file that ends too early.
    """
    pieces = [
        (reading, start) for reading in readings for start in range(0, reading.into.size, _PIECE)
    ]

    def read(piece: tuple[Reading, int]) -> None:
        reading, start = piece
        into = reading.into[start : start + _PIECE]
        reading.file.read(reading.offset + start, into)
        reading.file.release(reading.offset + start, into.size)

    if threads == 1:
        for piece in pieces:
            read(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, pieces):
            pass


def in_background(work: Callable[[], T]) -> Future[T]:
    """What `work` returns, from a thread that gives way to others and that nobody waits for when
    the process ends.
    """
    future: Future[T] = Future()

    def run() -> None:
        with suppress(OSError, AttributeError):  # where threads have no priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weights").start()
    return future
