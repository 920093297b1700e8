"""The Python packages: versions, and combinations that are known not to work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from mlcawq.doctor.findings import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

AREA = "packages"
# The wheels that bring a module `tvm` of their own.
_OTHER_TVM = re.compile(r"^(mlc-ai|mlc-llm|tvm)(-|$)")
_OPTIONAL = {
    "wgpu": ("vulkan", "GPUs through Vulkan"),
    "cuda-toolkit": ("cuda", "NVIDIA GPUs"),
    "datasets": ("hub-data", "calibration on data sets of the hub"),
    "sentencepiece": ("sentencepiece", "checkpoints that have only tokenizer.model"),
}
_SHOWN_FIRST = ("apache-tvm", "apache-tvm-ffi", "torch", "transformers", "tokenizers")


def installed() -> dict[str, str]:
    """Every distribution of this environment: normalised name -> version."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def findings(versions: Mapping[str, str] | None = None) -> list[Finding]:
    """versions: as `installed` has them, which is the default."""
    versions = installed() if versions is None else versions
    out = [_required(requirement, versions) for requirement in _requirements()]
    for name, (extra, purpose) in _OPTIONAL.items():
        if name in versions:
            out.append(Finding(AREA, name, "ok", versions[name]))
        else:
            out.append(Finding(AREA, name, "info", f"not installed; for {purpose}", _extra(extra)))
    return out + known_bad(versions)


def known_bad(versions: Mapping[str, str]) -> list[Finding]:
    """Combinations that install and then fail, with what is known of them."""
    from packaging.version import Version

    out = []
    ffi = versions.get("apache-tvm-ffi")
    if ffi is not None and Version(ffi) >= Version("0.1.15"):
        out.append(
            Finding(
                AREA,
                "apache-tvm-ffi crash",
                "broken",
                f"{ffi}: Schedule.tensorize crashes the process",
                "pip install apache-tvm-ffi==0.1.14.post1",
            )
        )
    others = sorted(name for name in versions if _OTHER_TVM.match(name))
    if others and "apache-tvm" in versions:
        out.append(
            Finding(
                AREA,
                "two TVMs",
                "broken",
                f"{', '.join(others)} and apache-tvm both install the module `tvm`",
                "keep mlc_llm in an environment of its own, name its interpreter in "
                f"MLCAWQ_MLC_PYTHON, and: pip uninstall {' '.join(others)} && "
                f"pip install --force-reinstall apache-tvm=={versions['apache-tvm']}",
            )
        )
    return out


def _requirements() -> list[Requirement]:
    """What mlcawq itself requires, by its own metadata, the important ones first."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("mlcawq") or []
    except metadata.PackageNotFoundError:
        lines = []
    required = [Requirement(line) for line in lines]
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    order = {name: i for i, name in enumerate(_SHOWN_FIRST)}
    return sorted(required, key=lambda r: (order.get(r.name.lower(), len(order)), r.name.lower()))


def _required(requirement: Requirement, versions: Mapping[str, str]) -> Finding:
    from packaging.version import Version

    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    if name not in versions:
        return Finding(AREA, name, "missing", "not installed", install)
    version = versions[name]
    # A local build ("2.13.0+cpu") counts as its public version.
    if requirement.specifier.contains(Version(version).public, prereleases=True):
        return Finding(AREA, name, "ok", version)
    wanted = f"{version}; tested with {requirement.specifier}"
    return Finding(AREA, name, "warning", wanted, install)


def _extra(extra: str) -> str:
    return f"pip install 'mlcawq[{extra}]'"
