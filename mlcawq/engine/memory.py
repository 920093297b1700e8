"""Memory that weights lie in: files mapped as they are, or one buffer of huge pages.

A mapped file is the system's page cache: nothing is copied, processes share it, and it can be
taken back and read again. It comes in pages of 4 KB, whose addresses take the processor so long to
look up that a decoder reads them at 70 to 80 % of the speed of huge pages (2 MB). Those are given
out for anonymous memory only.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from mlcawq.engine import cgroup

_HUGE_PAGE = 2**21
_PIECE = 2**24  # bytes that one thread reads at a time
_ADVICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def available_memory() -> int:
    """Bytes that can be allocated without swapping, in this process's control group."""
    machine = int(psutil.virtual_memory().available)
    group = cgroup.free_memory()
    return machine if group is None else min(machine, group)


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


def map_file(path: Path) -> np.ndarray:
    """A file's bytes, uint8, which the system reads in the background. Raises OSError.

    Writable, since DLPack hands on nothing else; what is written is the process's own.
    """
    with path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_WILLNEED"):
        memory.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(memory, np.uint8)


@dataclass(frozen=True)
class Reading:
    """Bytes of a file from `offset` on, and the memory (uint8) that they go to."""

    path: Path
    offset: int
    into: np.ndarray


def read_all(readings: Iterable[Reading], threads: int) -> None:
    """Read in parallel. Raises OSError, also for a file that ends too early."""
    pieces = [
        Reading(reading.path, reading.offset + start, reading.into[start : start + _PIECE])
        for reading in readings
        for start in range(0, reading.into.size, _PIECE)
    ]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_read, pieces):
            pass


def _read(piece: Reading) -> None:
    with piece.path.open("rb", buffering=0) as stream:
        stream.seek(piece.offset)
        left = memoryview(piece.into.data)
        while left:
            count = stream.readinto(left)
            if not count:
                raise OSError(0, "ends too early", str(piece.path))
            left = left[count:]
