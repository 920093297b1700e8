"""TVM's code generators, and the compilers of the system that they lean on."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from typing import Any

from mlcawq.doctor.findings import Finding
from mlcawq.doctor.processes import run, run_python

AREA = "compilers"

_TVM_PROBE = """
import json, tvm, tvm_ffi
names = tvm_ffi.registry.list_global_func_names()
def call(name, *args):
    f = tvm_ffi.get_global_func(name, allow_missing=True)
    try:
        return None if f is None else f(*args)
    except Exception:
        return None
kinds = sorted(n[len("target.build."):] for n in names if n.startswith("target.build."))
devices = sorted(n[len("device_api."):] for n in names if n.startswith("device_api."))
present = []
for kind in ("cuda", "vulkan", "metal", "rocm", "opencl", "webgpu"):
    try:
        if tvm.device(kind, 0).exist:
            present.append(kind)
    except Exception:
        pass
print(json.dumps({
    "version": tvm.__version__, "ffi": tvm_ffi.__version__, "path": tvm.__file__,
    "codegen": kinds, "device_api": devices, "devices": present,
    "llvm": call("target.llvm_version_major"),
    "cpu": str(call("target.llvm_get_system_cpu") or ""),
    "triple": str(call("target.llvm_get_system_triple") or ""),
}))
"""


def probe_tvm() -> tuple[dict[str, Any], str]:
    """What the installed TVM can generate code for and which devices it sees, or why it fails."""
    return run_python(_TVM_PROBE, timeout=120)


def tvm_findings(probe: Mapping[str, Any], error: str) -> list[Finding]:
    if error:
        fix = "pip install apache-tvm==0.26.0 apache-tvm-ffi==0.1.14.post1"
        return [Finding(AREA, "tvm", "broken", f"import fails: {error}", fix)]
    generators = [str(kind) for kind in probe["codegen"]]
    out = [
        Finding(AREA, "tvm", "ok", f"{probe['version']} with ffi {probe['ffi']}"),
        Finding(AREA, "code generators", "info", ", ".join(generators)),
    ]
    if "llvm" in generators:
        value = f"LLVM {probe['llvm']}, {probe['cpu']}, {probe['triple']}"
        out.append(Finding(AREA, "llvm", "ok", value))
    else:
        fix = "pip install --force-reinstall apache-tvm==0.26.0"
        out.append(Finding(AREA, "llvm", "missing", "this TVM was built without LLVM", fix))
    seen = ", ".join(map(str, probe["devices"])) or "none but the CPU"
    out.append(Finding(AREA, "devices seen by tvm", "info", seen))
    return out


def install_cxx() -> str:
    """The command that installs a C++ compiler on this system."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    for manager, command in (
        ("apt-get", "sudo apt-get install g++"),
        ("dnf", "sudo dnf install gcc-c++"),
        ("pacman", "sudo pacman -S gcc"),
        ("zypper", "sudo zypper install gcc-c++"),
        ("apk", "sudo apk add g++"),
    ):
        if shutil.which(manager):
            return command
    return "install g++ or clang"


def cxx_finding() -> Finding:
    # Here, so that the report does not end where numpy is missing.
    from mlcawq.build.link import find_compiler
    from mlcawq.errors import UserError

    try:
        compiler = find_compiler()
    except UserError:
        return Finding(AREA, "c++ compiler", "missing", "none found", install_cxx())
    outcome = run([compiler, "--version"])
    if outcome.ok:
        return Finding(AREA, "c++ compiler", "ok", f"{outcome.first_line} ({compiler})")
    return Finding(
        AREA,
        "c++ compiler",
        "broken",
        f"{compiler} --version: {outcome.error}",
        f"name another in CXX, or {install_cxx()}",
    )
