"""What the control group of this process leaves it: CPU time and memory, for containers that have
less than their machine (kernel: Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/).

A process is bound by its own group and by every group around that one, so that the smallest
number on the way up counts. Files that are not there limit nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_CPU_PERIOD = 100_000  # microseconds, the kernel's default


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time in a second that the group may use; None where it is not limited.

    root: of the file system that is read.
    """
    quotas = []
    for folder in _groups(root, ""):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / max(int(words[1]), 1))
    for folder in _groups(root, "cpu"):
        quota = _number(folder / "cpu.cfs_quota_us")
        if quota is not None:
            quotas.append(quota / (_number(folder / "cpu.cfs_period_us") or _CPU_PERIOD))
    return min(quotas, default=None)


def available_memory() -> int:
    """Bytes that this process can still allocate without swapping, in its control group."""
    machine = int(psutil.virtual_memory().available)
    group = free_memory()
    return machine if group is None else min(machine, group)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the group may still allocate, what its file cache would give back counted in;
    None where it is not limited.
    """
    return min((max(limit - used, 0) for limit, used in _memory(root)), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the group may allocate in all; None where it is not limited. Version 1 has a
    number beyond every machine's memory then.
    """
    return min((limit for limit, _ in _memory(root)), default=None)


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Of every group that limits it: how much it may have, and has without its file cache."""
    names = ("memory.max", "memory.current", "inactive_file")
    old_names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for controller, (most, used, cached) in (("", names), ("memory", old_names)):
        for folder in _groups(root, controller):
            limit, usage = _number(folder / most), _number(folder / used)
            if limit is not None and usage is not None:
                yield limit, usage - _cached(folder, cached)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups, the innermost first. controller: "" is version 2."""
    mount = root / "sys/fs/cgroup" / controller
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # In a container the path may be the host's, of which only the root is mounted.
            folder = mount / path.lstrip("/")
            while folder != mount:
                yield folder
                folder = folder.parent
            yield mount


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """A limit that is one: "max", and -1 in version 1, are none."""
    words = _words(path)
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _cached(folder: Path, name: str) -> int:
    words = _words(folder / "memory.stat")
    return int(words[words.index(name) + 1]) if name in words else 0
