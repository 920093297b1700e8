"""Time and memory of a piece of work."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path

import torch

from mlcawq.quantize.report.data import Usage

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of the resident set size to its value now


class Meter:
    """Measures from its making, or from the last `lap`, on.

    Memory is that of the GPU where the device is one, else the resident set of this process.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._begin()

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        self._started = time.perf_counter()

    def lap(self) -> Usage:
        """What was used since the last lap; the next one begins."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _peak()
        usage = Usage(time.perf_counter() - self._started, peak)
        self._begin()
        return usage


def joined(usages: list[Usage]) -> Usage:
    """Of works that followed each other."""
    return Usage(
        sum(usage.seconds for usage in usages),
        max((usage.peak_memory for usage in usages), default=0),
    )


def _reset_peak() -> None:
    # Outside Linux and in some sandboxes the peak stays that of the whole process.
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
