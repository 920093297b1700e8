"""Cores and control groups, as the files of a made-up kernel describe them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlcawq.cgroup import cpu_quota, free_memory, memory_limit
from mlcawq.engine.cores import default_threads, physical_cores


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def machine(root: Path, siblings: list[str]) -> Path:
    """siblings: of each logical CPU, as the kernel writes them."""
    folder = "sys/devices/system/cpu"
    files = {
        f"{folder}/cpu{i}/topology/thread_siblings_list": text for i, text in enumerate(siblings)
    }
    return write(root, dict(files))


def test_siblings_count_once(tmp_path: Path) -> None:
    neighbours = machine(tmp_path / "a", ["0-1", "0-1", "2-3", "2-3"])
    assert physical_cores({0, 1, 2, 3}, neighbours) == [0, 2]
    apart = machine(tmp_path / "b", ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert physical_cores(set(range(8)), apart) == [0, 1, 2, 3]


def test_affinity_and_cpuset_are_respected(tmp_path: Path) -> None:
    root = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert physical_cores({1, 5, 6}, root) == [1, 6]
    assert physical_cores({7}, root) == [7]


def test_a_kernel_that_says_nothing(tmp_path: Path) -> None:
    assert physical_cores({0, 1, 2}, tmp_path) == [0, 1, 2]


def test_slow_cores_are_left_out(tmp_path: Path) -> None:
    intel = machine(tmp_path / "intel", ["0-1", "0-1", "2", "3"])
    write(intel, {"sys/devices/cpu_core/cpus": "0-1", "sys/devices/cpu_atom/cpus": "2-3"})
    assert physical_cores({0, 1, 2, 3}, intel) == [0]
    assert physical_cores({2, 3}, intel) == [2, 3]  # only slow ones are allowed
    arm = machine(tmp_path / "arm", ["0", "1", "2", "3"])
    capacities = [400, 400, 760, 1024]
    write(arm, {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": c for i, c in enumerate(capacities)})
    assert physical_cores({0, 1, 2, 3}, arm) == [2, 3]


def test_threads_follow_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert default_threads(root) == 4
    write(root, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"})
    assert default_threads(root) == 2
    write(root, {"sys/fs/cgroup/cpu.max": "50000 100000"})
    assert default_threads(root) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    write(root, {"sys/fs/cgroup/cpu.max": "max 100000"})
    assert default_threads(root) == 1


def test_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    assert default_threads(tmp_path) == 6


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/outer/inner",
        "sys/fs/cgroup/outer/cpu.max": "150000 100000",
        "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
        "sys/fs/cgroup/outer/memory.max": 1000,
        "sys/fs/cgroup/outer/memory.current": 600,
        "sys/fs/cgroup/outer/memory.stat": "anon 5\ninactive_file 50\nactive_file 7",
        "sys/fs/cgroup/outer/inner/memory.max": "max",
        "sys/fs/cgroup/outer/inner/memory.current": 10,
    }
    root = write(tmp_path, groups)
    assert cpu_quota(root) == 1.5
    assert free_memory(root) == 450
    assert memory_limit(root) == 1000
    write(root, {"sys/fs/cgroup/outer/memory.current": 2000})
    assert free_memory(root) == 0


def test_groups_of_version_1(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": 300000,
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 4096,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 4000,
        "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 100",
    }
    root = write(tmp_path, groups)
    assert cpu_quota(root) == 3.0
    assert free_memory(root) == 196


def test_nothing_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert free_memory(tmp_path) is None
    assert memory_limit(tmp_path) is None
    root = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"})
    assert free_memory(root) is None
