"""Vulkan: its loader, its drivers, and whether TVM can compute through them."""

from __future__ import annotations

import ctypes.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcawq.doctor.findings import Finding, Status
from mlcawq.doctor.processes import run, run_python

AREA = "vulkan"

RUNTIME = "vulkan runtime"

# In a process of its own: a driver that is broken takes the process with it.
_RUNTIME_PROBE = """
import dataclasses, json
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
import numpy as np, tvm
from mlcawq.engine import wgpu
from mlcawq.errors import UserError
devices, what, fix = [], "", ""
try:
    wgpu.load()
    devices = [dataclasses.asdict(limits) for limits in wgpu.adapters()]
    numbers = np.arange(1024, dtype="float32")
    for index in range(len(devices)):
        there = tvm.runtime.tensor(numbers, device=tvm.device("webgpu", index))
        if not (there.numpy() == numbers).all():
            what = f"what is copied to vulkan:{index} comes back changed"
            fix = "update the Vulkan driver"
except UserError as error:
    what, fix = error.problems[0].what, error.problems[0].fix
print(json.dumps({"devices": devices, "what": what, "fix": fix}))
"""
_INSTALL = "pip install 'mlcawq[vulkan]'"
_ICD_FOLDERS = (
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
    "~/.local/share/vulkan/icd.d",
)


def findings() -> list[Finding]:
    return [_loader(), _drivers(), *_runtime()]


def _loader() -> Finding:
    library = ctypes.util.find_library("vulkan")
    fix = "sudo apt-get install libvulkan1"
    if library is None:
        return Finding(AREA, "loader", "info", "libvulkan is not installed", fix)
    if not shutil.which("vulkaninfo"):
        return Finding(AREA, "loader", "ok", library)
    outcome = run(["vulkaninfo", "--summary"], timeout=30)
    if not outcome.ok:
        return Finding(AREA, "loader", "warning", f"{library}, vulkaninfo: {outcome.error}")
    names = [
        line.partition("=")[2].strip()
        for line in outcome.stdout.splitlines()
        if line.strip().startswith("deviceName")
    ]
    return Finding(AREA, "loader", "ok", f"{library}: {', '.join(names) or 'no device'}")


def _drivers() -> Finding:
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES") or ""
    files = [Path(name) for name in named.split(os.pathsep) if name]
    for folder in _ICD_FOLDERS:
        files += sorted(Path(folder).expanduser().glob("*.json"))
    if files:
        return Finding(AREA, "drivers", "ok", ", ".join(sorted({f.stem for f in files})))
    fix = "sudo apt-get install mesa-vulkan-drivers, or your GPU vendor's driver"
    return Finding(AREA, "drivers", "info", "none installed", fix)


def _runtime() -> list[Finding]:
    """TVM's device over wgpu-native: each GPU with its limits, and a copy there and back."""
    probe, error = run_python(_RUNTIME_PROBE, timeout=180)  # the first use compiles it
    if error:
        return [Finding(AREA, RUNTIME, "broken", error, f"update the Vulkan driver, or {_INSTALL}")]
    out = [
        Finding(AREA, f"vulkan:{index}", "ok", _limits_text(limits))
        for index, limits in enumerate(probe["devices"])
    ]
    if probe["what"]:
        status: Status = "broken" if out else "info"
        return [*out, Finding(AREA, RUNTIME, status, probe["what"], probe["fix"] or _INSTALL)]
    return [*out, Finding(AREA, RUNTIME, "ok", "TVM computes on it, through wgpu-native")]


def _limits_text(limits: Mapping[str, Any]) -> str:
    half = "float16" if limits["shader_f16"] else "no float16 (use --quantization q4f32_autoawq)"
    return (
        f"{limits['name']} ({limits['device_type']}, {limits['backend']}, {limits['driver']}), "
        f"{half}, {limits['max_storage_buffer_binding_size'] >> 20} MiB of a buffer at a time, "
        f"workgroups of {limits['max_compute_invocations_per_workgroup']} threads and "
        f"{limits['max_compute_workgroup_storage_size'] >> 10} KiB"
    )
