"""All probes, and what follows from them for each thing a user may want to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mlcawq.doctor import compilers, cuda, machine, mlc, packages, vulkan
from mlcawq.doctor.findings import Capability, Finding, Report


def examine() -> Report:
    """Look at everything. Slow probes run side by side; none can fail or hang the others."""
    versions = packages.installed()
    probes: list[tuple[str, Callable[[], Sequence[Finding]]]] = [
        (machine.AREA, machine.findings),
        (packages.AREA, lambda: packages.findings(versions)),
        (compilers.AREA, lambda: compilers.tvm_findings(*compilers.probe_tvm())),
        (compilers.AREA, lambda: [compilers.cxx_finding()]),
        (cuda.AREA, lambda: cuda.findings(versions)),
        (vulkan.AREA, vulkan.findings),
        (mlc.AREA, mlc.findings),
    ]
    with ThreadPoolExecutor(len(probes)) as pool:
        found = list(pool.map(lambda probe: _safely(*probe), probes))
    findings = tuple(finding for part in found for finding in part)
    return Report(findings, tuple(capabilities(findings)))


def capabilities(findings: Sequence[Finding]) -> list[Capability]:
    """What works here, what does not, and the first thing to do about it."""
    bad = [f for f in findings if f.status in ("missing", "broken")]

    def needs(name: str, *wanted: str, areas: Sequence[str] = ()) -> Capability:
        lacking = [f for f in bad if f.name in wanted or f.area in areas]
        if not lacking:
            return Capability(name, True)
        return Capability(
            name,
            False,
            "; ".join(f"{f.name}: {f.value}" for f in lacking),
            "; ".join(dict.fromkeys(f.fix for f in lacking if f.fix)),
        )

    return [
        needs("quantize a model (CPU)", areas=[packages.AREA]),
        needs("build for the CPU", "tvm", "llvm", "c++ compiler", areas=[packages.AREA]),
        needs("chat and evaluate on the CPU", "tvm", areas=[packages.AREA]),
        _optional(findings, "calibrate on data sets of the hub", "datasets"),
        _optional(findings, "read checkpoints with only tokenizer.model", "sentencepiece"),
        _optional(findings, "build for CUDA", cuda.COMPILER),
        _on_gpu(findings),
        needs("build for Vulkan", "tvm", "llvm", "c++ compiler", areas=[packages.AREA]),
        _optional(findings, "chat and evaluate on Vulkan", vulkan.RUNTIME),
        _optional(findings, "build through mlc_llm", mlc.BUILDS),
        _optional(findings, "run built folders with mlc_llm", mlc.RUNS, mlc.BUILDS),
    ]


def _optional(findings: Sequence[Finding], name: str, *wanted: str) -> Capability:
    """wanted: the finding that decides; or the first of several that is there."""
    found = {f.name: f for f in findings}
    finding = next((found[name] for name in wanted if name in found), None)
    if finding is None or finding.status == "ok":
        return Capability(name, finding is not None)
    return Capability(name, False, finding.value, finding.fix)


def _on_gpu(findings: Sequence[Finding]) -> Capability:
    """CUDA's runtime is looked at only where there is a GPU; what lacks is the first of the two."""
    asked = [f for f in findings if f.area == cuda.AREA and f.name.startswith("gpu")]
    asked += [f for f in findings if f.name == cuda.RUNTIME]
    lacking = next((f for f in asked if f.status != "ok"), None)
    name = "chat and evaluate on CUDA"
    if lacking is None:
        return Capability(name, bool(asked))
    return Capability(name, False, lacking.value, lacking.fix)


def _safely(area: str, probe: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """A probe that fails in a way nobody foresaw is itself a finding, not the end of the report."""
    try:
        return probe()
    except Exception as error:
        value = f"could not be examined: {type(error).__name__}: {error}"
        return [Finding(area, f"{area} probe", "warning", value, "report this as a bug of mlcawq")]
