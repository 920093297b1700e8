"""How many threads a model runs best on: one for each physical core that this process may use.

Decoding waits for memory, and two threads of one core share its caches and its way to memory: a
second one only takes turns with the first (Hyper-Threading, SMT). Work is cut into equal parts,
so that slow cores beside fast ones (Intel's E-cores, Arm's little ones) would be waited for.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from mlcawq.cgroup import cpu_quota

_SLOW = 0.6  # of the largest capacity that the kernel names: Arm's middle cores are above it


def default_threads(root: Path = Path("/")) -> int:
    """Physical cores, without slow ones, that affinity and cpuset allow, as far as the control
    group's quota of CPU time goes; at least 1. root: of the file system that is read.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(physical_cores(os.sched_getaffinity(0), root))
    else:
        count = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(count if quota is None else min(count, int(quota)), 1)


def physical_cores(allowed: set[int], root: Path = Path("/")) -> list[int]:
    """Of the logical CPUs `allowed`, the first of each fast core, in order of number."""
    folder = root / "sys/devices/system/cpu"
    siblings = {cpu: _listed(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in allowed}
    firsts = sorted({min((siblings[cpu] & allowed) or {cpu}) for cpu in allowed})
    # Intel's hybrids name the performance cores, Arm's kernels every core's capacity.
    fast = _listed(root / "sys/devices/cpu_core/cpus")
    if not fast.isdisjoint(firsts):
        return [cpu for cpu in firsts if cpu in fast]
    capacities = {cpu: _capacity(folder / f"cpu{cpu}/cpu_capacity") for cpu in firsts}
    least = _SLOW * max(capacities.values(), default=0)
    return [cpu for cpu in firsts if capacities[cpu] >= least]


def _listed(path: Path) -> set[int]:
    """CPUs written as the kernel does: 0-3,8,10-11."""
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _capacity(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
