"""Graphics processors: NVIDIA's driver and compilers, Vulkan's loader and drivers."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mlcawq.doctor.findings import Finding
from mlcawq.doctor.processes import run, run_python

CUDA = "cuda"
VULKAN = "vulkan"

_NVRTC_PROBE = """
import json
from cuda.bindings import nvrtc
error, major, minor = nvrtc.nvrtcVersion()
print(json.dumps({"version": f"{major}.{minor}", "error": int(error)}))
"""
_WGPU_PROBE = """
import json, wgpu
adapters = wgpu.gpu.enumerate_adapters_sync()
print(json.dumps({"version": wgpu.__version__, "adapters": [
    f"{a.info['device']} ({a.info['backend_type']})" for a in adapters]}))
"""
_ICD_FOLDERS = (
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
    "~/.local/share/vulkan/icd.d",
)


def cuda_findings(versions: Mapping[str, str]) -> list[Finding]:
    out = [*_driver(), _nvcc(), _nvrtc()]
    torch = versions.get("torch", "")
    if torch:
        kind = "a CPU build" if "+cpu" in torch else "a build that may use CUDA"
        out.append(Finding(CUDA, "torch build", "info", f"{torch}, {kind}"))
    return out


def _driver() -> list[Finding]:
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    outcome = run(["nvidia-smi", query, "--format=csv,noheader"], timeout=30)
    if outcome.ok and outcome.first_line:
        return [
            Finding(CUDA, f"gpu {i}", "ok", line.strip())
            for i, line in enumerate(outcome.stdout.strip().splitlines())
        ]
    library = ctypes.util.find_library("cuda")
    if library:
        return [Finding(CUDA, "gpu", "warning", f"{library} is there, nvidia-smi {outcome.error}")]
    if outcome.error == "not found":
        fix = "with an NVIDIA GPU in the machine, install NVIDIA's driver"
        return [Finding(CUDA, "gpu", "info", "no NVIDIA driver", fix)]
    fix = "reinstall NVIDIA's driver; after an update, restart the machine"
    return [Finding(CUDA, "gpu", "broken", f"nvidia-smi: {outcome.error}", fix)]


def _nvcc() -> Finding:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc") or next(
        (str(path) for place in places if place and (path := Path(place) / "bin/nvcc").is_file()),
        None,
    )
    if found is None:
        return Finding(CUDA, "nvcc", "info", "not found; NVRTC does as well")
    outcome = run([found, "--version"])
    lines = [line for line in outcome.stdout.splitlines() if "release" in line]
    if outcome.ok and lines:
        return Finding(CUDA, "nvcc", "ok", f"{lines[0].strip()} ({found})")
    return Finding(CUDA, "nvcc", "broken", f"{found}: {outcome.error}", "reinstall CUDA's toolkit")


def _nvrtc() -> Finding:
    fix = "pip install cuda-bindings nvidia-cuda-nvrtc"
    if not _has_module("cuda.bindings"):
        return Finding(CUDA, "nvrtc", "info", "cuda-bindings is not installed", fix)
    probe, error = run_python(_NVRTC_PROBE)
    if error:
        return Finding(CUDA, "nvrtc", "broken", error, fix)
    return Finding(CUDA, "nvrtc", "ok", probe["version"])


def vulkan_findings() -> list[Finding]:
    return [_loader(), _drivers(), _wgpu()]


def _loader() -> Finding:
    library = ctypes.util.find_library("vulkan")
    fix = "sudo apt-get install libvulkan1"
    if library is None:
        return Finding(VULKAN, "loader", "info", "libvulkan is not installed", fix)
    if not shutil.which("vulkaninfo"):
        return Finding(VULKAN, "loader", "ok", library)
    outcome = run(["vulkaninfo", "--summary"], timeout=30)
    if not outcome.ok:
        return Finding(VULKAN, "loader", "warning", f"{library}, vulkaninfo: {outcome.error}")
    names = [
        line.partition("=")[2].strip()
        for line in outcome.stdout.splitlines()
        if line.strip().startswith("deviceName")
    ]
    return Finding(VULKAN, "loader", "ok", f"{library}: {', '.join(names) or 'no device'}")


def _drivers() -> Finding:
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES") or ""
    files = [Path(name) for name in named.split(os.pathsep) if name]
    for folder in _ICD_FOLDERS:
        files += sorted(Path(folder).expanduser().glob("*.json"))
    if files:
        return Finding(VULKAN, "drivers", "ok", ", ".join(sorted({f.stem for f in files})))
    fix = "sudo apt-get install mesa-vulkan-drivers, or your GPU vendor's driver"
    return Finding(VULKAN, "drivers", "info", "none installed", fix)


def _wgpu() -> Finding:
    fix = "pip install wgpu"
    if not _has_module("wgpu"):
        return Finding(VULKAN, "wgpu", "info", "not installed", fix)
    probe, error = run_python(_WGPU_PROBE)
    if error:
        return Finding(VULKAN, "wgpu", "broken", error, fix)
    adapters = ", ".join(probe["adapters"]) or "no adapter"
    return Finding(VULKAN, "wgpu", "ok", f"{probe['version']}: {adapters}")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
