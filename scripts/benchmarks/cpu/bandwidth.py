"""How fast this machine reads memory: what decoding is measured against.

A kernel of TVM's, so that no other compiler is needed: threads sum their parts of a buffer that no
cache holds. What is reached depends on the pages (a huge page is one entry of the TLB for 512
small ones, and the processor's own prefetcher stops at the end of a page) and on asking for lines
ahead of their use; so all combinations are measured.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.read_kernel import LANES, read_kernel

_LINE = 64  # bytes
_AHEAD = (0, 512, 1024, 2048)  # bytes
_HUGE_PAGE = 2**21
_PAGES = {"plain pages": mmap.MADV_NOHUGEPAGE, "huge pages": mmap.MADV_HUGEPAGE}


class Reader:
    """threads: that read together; TVM_NUM_THREADS is to say the same. megabytes: of the buffer."""

    def __init__(self, threads: int, megabytes: int = 512) -> None:
        import tvm

        from mlcawq.build.cpu_target import native_target

        target = native_target()
        self._kernels = {
            ahead: tvm.compile(read_kernel(threads, ahead // _LINE), target=target)
            for ahead in _AHEAD
        }
        unit = _HUGE_PAGE * threads
        self._nbytes = max(megabytes * 2**20 // unit, 1) * unit
        before = _huge_bytes()
        self._buffers = {kind: self._pages(advice) for kind, advice in _PAGES.items()}
        self._huge = (_huge_bytes() - before) / self._nbytes
        self._sums = tvm.runtime.tensor(np.zeros((threads, LANES), np.int32))

    def read(self) -> dict[str, float]:
        """Bytes a second, the best over the distances, by the kind of pages."""
        return {
            kind: max(self._once(buffer, ahead) for ahead in _AHEAD)
            for kind, buffer in self._buffers.items()
        }

    def facts(self) -> dict[str, Any]:
        """The share of the second buffer that huge pages were to be had for."""
        return {"share_in_huge_pages": round(self._huge, 3)}

    def total(self) -> int:
        """The sum that the last reading came to, modulo 2**32: each row adds LANES."""
        return int(self._sums.numpy().sum(dtype=np.uint32))

    def rows(self) -> int:
        return self._nbytes // _LINE

    def _once(self, buffer: Any, ahead: int) -> float:
        start = time.perf_counter()
        self._kernels[ahead](buffer, self._sums)
        return self._nbytes / (time.perf_counter() - start)

    def _pages(self, advice: int) -> Any:
        import tvm

        memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        array = np.frombuffer(memory, np.int32).reshape(-1, LANES)
        array[:] = 1  # a page that nobody wrote to is the one page of zeros
        return tvm.runtime.from_dlpack(array)


def _huge_bytes() -> int:
    """Of this process, in huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0
