"""The machine: system, processor, memory, disk."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from mlcawq.doctor.findings import Finding
from mlcawq.engine.processor import Processor, this_processor
from tir_kernels.levels import levels_of

AREA = "machine"
_PYTHONS = ((3, 10), (3, 13))
# Instruction sets that decide how fast compiled code is.
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_int8", "asimd", "sve", "i8mm")
_SMALL_MEMORY = 4 * 2**30
_SMALL_DISK = 5 * 2**30


def findings() -> list[Finding]:
    try:
        memory = _memory()
    except ImportError:  # psutil; the packages' findings say so
        memory = []
    return [_system(), _python(), *_processor(), *memory, *_disks()]


def _system() -> Finding:
    name = f"{platform.system()} {platform.release()} {platform.machine()}"
    with contextlib.suppress(OSError, KeyError):
        name = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    if platform.system() == "Linux":
        return Finding(AREA, "system", "ok", name)
    return Finding(
        AREA, "system", "warning", name, "mlcawq is tested on Linux; use WSL or a container"
    )


def _python() -> Finding:
    version = platform.python_version()
    low, high = _PYTHONS
    if low <= sys.version_info[:2] <= high:
        return Finding(AREA, "python", "ok", f"{version} ({sys.executable})")
    fix = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Finding(AREA, "python", "warning", f"{version} is untested", fix)


def _processor() -> list[Finding]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    out = [Finding(AREA, "processor", "info", f"{model}, {usable} cores usable")]
    level = _level(this_processor())
    if flags and platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        out.append(
            Finding(
                AREA,
                "instructions",
                "warning",
                f"{', '.join(known) or 'none'}{level}; no AVX2: CPU inference will be slow",
                "use a processor from 2013 or later, or a virtual machine that passes AVX2 on",
            )
        )
    elif known:
        out.append(Finding(AREA, "instructions", "ok", f"{', '.join(known)}{level}"))
    return out


def _level(processor: Processor) -> str:
    """Which of its variants a library for `--target cpu` takes here, to be put after a list."""
    levels = levels_of(processor.architecture)
    if not levels or processor.features is None:
        return ""
    if not processor.levels:
        lacking = ", ".join(processor.lacks(levels[0].features))
        return f"; less than {levels[0].name}, the lowest of --target cpu (lacks {lacking})"
    return f"; level {processor.levels[-1].name}"


def _memory() -> list[Finding]:
    import psutil

    from mlcawq import cgroup

    memory = psutil.virtual_memory()
    text = f"{gib(memory.available)} free of {gib(memory.total)}"
    limit, available = cgroup.memory_limit(), cgroup.available_memory()
    if limit is not None and limit < memory.total:
        text += f"; this container is limited to {gib(limit)}"
    if available < _SMALL_MEMORY:
        fix = "close other programs; a model of 1B parameters wants about 4 GiB to be quantized"
        return [Finding(AREA, "memory", "warning", text, fix)]
    return [Finding(AREA, "memory", "ok", text)]


def _disks() -> list[Finding]:
    out = []
    for name, path in (("disk here", Path.cwd()), ("disk for scratch", tempfile.gettempdir())):
        free = shutil.disk_usage(path).free
        text = f"{gib(free)} free at {path}"
        if free < _SMALL_DISK:
            fix = "free some space, or write with -o to another disk"
            out.append(Finding(AREA, name, "warning", text, fix))
        else:
            out.append(Finding(AREA, name, "ok", text))
    return out


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
