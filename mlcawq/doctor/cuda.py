"""NVIDIA: the driver and its GPUs, what compiles for them, and what TVM needs to run on them."""

from __future__ import annotations

from collections.abc import Mapping

from mlcawq.doctor.findings import Finding
from mlcawq.doctor.processes import run, run_python

AREA = "cuda"
COMPILER = "cuda compiler"
RUNTIME = "cuda runtime"

# In a process of its own: a driver that is broken takes the process with it.
_DRIVER_PROBE = """
import json
from mlcawq.engine.cuda_driver import find_driver
driver, reason = find_driver()
print(json.dumps({"reason": reason} if driver is None else {
    "version": ".".join(map(str, driver.version)),
    "gpus": [[gpu.name, gpu.arch, gpu.memory] for gpu in driver.gpus],
}))
"""
_RUNTIME_PROBE = """
import json
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.cuda_runtime import load_cuda_runtime
driver, reason, fix = load_cuda_runtime()
import tvm
works = driver is not None and bool(tvm.device("cuda", 0).exist)
print(json.dumps({"works": works, "reason": reason or "TVM finds no GPU", "fix": fix}))
"""


def findings(versions: Mapping[str, str]) -> list[Finding]:
    """versions: of the installed distributions."""
    gpus = _gpus()
    out = [*gpus, _compiler()]
    if all(finding.status == "ok" for finding in gpus):
        out.append(_runtime())
    torch = versions.get("torch", "")
    if torch:
        kind = "a CPU build" if "+cpu" in torch else "a build that may use CUDA"
        out.append(Finding(AREA, "torch build", "info", f"{torch}, {kind}"))
    return out


def _gpus() -> list[Finding]:
    probe, error = run_python(_DRIVER_PROBE)
    if error:
        fix = "reinstall NVIDIA's driver; after an update, restart the machine"
        return [Finding(AREA, "gpu", "broken", f"NVIDIA's driver: {error}", fix)]
    if probe.get("gpus"):
        return [
            Finding(
                AREA,
                f"gpu {i}",
                "ok",
                f"{name} ({arch}), {memory / 1e9:.1f} GB, driver for CUDA {probe['version']}",
            )
            for i, (name, arch, memory) in enumerate(probe["gpus"])
        ]
    # nvidia-smi tells a driver that does not work from one that is not there.
    outcome = run(["nvidia-smi"], timeout=30)
    reason = probe.get("reason", "NVIDIA's driver lists no GPU")
    if outcome.error == "not found":
        fix = "with an NVIDIA GPU in the machine, install NVIDIA's driver"
        return [Finding(AREA, "gpu", "info", reason, fix)]
    said = f"; nvidia-smi: {outcome.error}" if outcome.error else ""
    fix = "reinstall NVIDIA's driver; after an update, restart the machine"
    return [Finding(AREA, "gpu", "broken", f"{reason}{said}", fix)]


def _compiler() -> Finding:
    # Here, so that the report does not end where a package is missing.
    from mlcawq.build.cuda_compiler import find_cuda_compiler
    from mlcawq.errors import UserError

    try:
        return Finding(AREA, COMPILER, "ok", find_cuda_compiler().describe)
    except UserError as error:
        (problem,) = error.problems
        return Finding(AREA, COMPILER, "info", problem.what, problem.fix)


def _runtime() -> Finding:
    probe, error = run_python(_RUNTIME_PROBE, timeout=120)
    if error:
        return Finding(AREA, RUNTIME, "broken", error, "pip install 'mlcawq[cuda]'")
    if probe["works"]:
        return Finding(AREA, RUNTIME, "ok", "TVM runs on the GPU")
    return Finding(AREA, RUNTIME, "missing", probe["reason"], probe["fix"])
