"""What in an environment with mlc_llm does not fit together, and the pip line that mends it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "MLCAWQ_MLC_PYTHON"
OLDEST_PYTHON = (3, 10)  # what the plug-in is written in
TESTED_TVM = "0.26.0"
_WHEELS = "--pre -U -f https://mlc.ai/wheels mlc-llm-nightly-{0} mlc-ai-nightly-{0}"
# The steps need these of what mlc_llm itself requires; the others serve its chat and server.
NEEDED = ("torch", "safetensors", "transformers", "numpy")


@dataclass(frozen=True)
class Skew:
    """Two things in that environment that do not fit together.

    breaks: what cannot succeed with it: everything, only steps that run our plug-in, or nothing,
        and then it is worth a warning.
    """

    what: str
    fix: str
    breaks: Literal["everything", "plugin", "nothing"]


def install_line(python: str | os.PathLike[str] | None = None) -> str:
    """The command that installs mlc_llm, into a new environment or into that of `python`."""
    wheels = f"{_WHEELS.format('cpu')} (or -cu130 for CUDA 13)"
    if python is not None:
        return f"{python} -m pip install {wheels}"
    return (
        f"python -m venv mlc && mlc/bin/pip install {wheels}, then "
        f"export {VARIABLE}=$PWD/mlc/bin/python"
    )


def tvm_distributions(versions: Mapping[str, str]) -> list[str]:
    """The installed packages that bring a module `tvm`."""
    return sorted(
        name for name in versions if re.match(r"(mlc-ai-|apache-tvm$|tvm$|tvm-nightly)", name)
    )


def find_skews(python: Path, facts: Mapping[str, Any]) -> list[Skew]:
    """What of the probe's `facts` does not fit together, the worst first."""
    pip = f"{python} -m pip"
    versions: Mapping[str, str] = facts.get("versions", {})
    found = [*_python_skews(facts), *_tvm_skews(pip, facts, versions)]
    found += _import_skews(facts, python)
    lacking = [name for name in NEEDED if name not in versions]
    if lacking:
        found.append(
            Skew(
                f"what mlc_llm needs to convert weights is not installed: {', '.join(lacking)}",
                f"{pip} install {' '.join(lacking)}",
                "everything",
            )
        )
    found += _requirement_skews(pip, facts, versions)
    return sorted(found, key=lambda skew: ("everything", "plugin", "nothing").index(skew.breaks))


def _python_skews(facts: Mapping[str, Any]) -> list[Skew]:
    version = tuple(facts["python"])
    if version[:2] >= OLDEST_PYTHON:
        return []
    return [
        Skew(
            f"this is Python {dotted(version)}; our plug-in needs {dotted(OLDEST_PYTHON)}",
            f"make an environment with a newer Python: {install_line()}",
            "plugin",
        )
    ]


def _tvm_skews(pip: str, facts: Mapping[str, Any], versions: Mapping[str, str]) -> list[Skew]:
    owners = tvm_distributions(versions)
    if not facts.get("has_tvm", True):
        return [
            Skew("mlc_llm is here and its TVM is not", _install_tvm(pip, versions), "everything")
        ]
    found = []
    if len(owners) > 1:
        found.append(
            Skew(
                f"{' and '.join(owners)} both install the module `tvm`, and one has overwritten "
                "files of the other",
                f"{pip} uninstall -y {' '.join(owners)} && {_install_tvm(pip, versions)}",
                "everything",
            )
        )
    found += _variant_skews(pip, facts, versions)
    wanted, present = facts.get("names_wanted"), facts.get("names_present")
    lost = [name for name in ("tirx", "tir") if name in (wanted or ()) and present is not None]
    lost = [name for name in lost if name not in present]  # type: ignore[operator]
    if lost and not set(wanted or ()) & {"tir", "tirx"} & set(present or ()):
        age = "newer" if "tirx" in lost else "older"
        found.append(
            Skew(
                f"mlc_llm {facts.get('mlc_llm')} is written for a TVM that is {age} than the "
                f"{facts.get('tvm')} here: it imports tvm.{lost[0]}, which this one does not have",
                _install_tvm(pip, versions),
                "everything",
            )
        )
    if "generators" in facts and "llvm" not in facts["generators"]:
        found.append(
            Skew(
                f"the TVM {facts.get('tvm')} there was built without LLVM, which every library "
                "needs for its host code",
                _install_tvm(pip, versions),
                "everything",
            )
        )
    ours = "apache-tvm" in owners and len(owners) == 1
    if ours and _release(facts.get("tvm_ffi", "")) >= (0, 1, 15):
        found.append(
            Skew(
                f"apache-tvm-ffi {facts['tvm_ffi']} crashes the process in Schedule.tensorize",
                f"{pip} install apache-tvm-ffi==0.1.14.post1",
                "nothing",
            )
        )
    if ours and not facts.get("module") and facts.get("tvm") not in (None, TESTED_TVM):
        found.append(
            Skew(
                f"mlc_llm without its compiled module is tested on apache-tvm {TESTED_TVM}, and "
                f"this is {facts['tvm']}",
                f"{pip} install apache-tvm=={TESTED_TVM} apache-tvm-ffi==0.1.14.post1",
                "nothing",
            )
        )
    return found


def _variant_skews(pip: str, facts: Mapping[str, Any], versions: Mapping[str, str]) -> list[Skew]:
    """mlc.ai's wheels come in variants (-cpu, -cu130, …) that only fit each other."""
    pattern = re.compile(r"(mlc-llm|mlc-ai)(?:-nightly)?-(cpu|cu\d+|rocm\d+)$")
    variants: dict[str, str] = {}
    for name in versions:
        if match := pattern.match(name):
            variants[match[1]] = match[2]
    if len(set(variants.values())) < 2:
        return []
    named = " and ".join(f"{part}'s is {variant}" for part, variant in sorted(variants.items()))
    fix = f"{pip} install --force-reinstall {_WHEELS.format(variants['mlc-llm'])}"
    return [Skew(f"the wheels are of different variants: {named}", fix, "everything")]


def _import_skews(facts: Mapping[str, Any], python: Path) -> list[Skew]:
    error, stage = str(facts.get("error", "")), facts.get("stage", "")
    if not error or facts.get("imports"):
        return []
    pip, versions = f"{python} -m pip", facts.get("versions", {})
    if absent := re.search(r"No module named '([\w.]+)'", error):
        fix = f"{pip} install {absent[1].partition('.')[0].replace('_', '-')}"
        return [Skew(f"{stage} fails: {error}", fix, "everything")]
    if stage != "import mlc_llm":
        what = f"{stage or 'the look at it'} fails: {error}"
        return [Skew(what, _install_tvm(pip, versions), "everything")]
    what = (
        f"the compiled module of mlc_llm ({facts['module']}) does not fit the TVM "
        f"{facts.get('tvm')} there: {error}"
    )
    # An error is survived by leaving the module out; a crash is not.
    return [
        Skew(
            what,
            _install_tvm(pip, versions),
            "everything" if error.startswith("killed") else "nothing",
        )
    ]


def _requirement_skews(
    pip: str, facts: Mapping[str, Any], versions: Mapping[str, str]
) -> list[Skew]:
    """Requirements of the installed TVM and mlc_llm that another package's version breaks."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    found = []
    for owner, lines in facts.get("requires", {}).items():
        for line in lines:
            try:
                requirement = Requirement(line)
                name = re.sub(r"[-_.]+", "-", requirement.name).lower()
                if requirement.marker is not None or name not in versions:
                    continue
                if requirement.specifier.contains(versions[name], prereleases=True):
                    continue
            except (InvalidRequirement, InvalidVersion):
                continue
            found.append(
                Skew(
                    f"{owner} {versions.get(owner)} wants {requirement}, and {name} is "
                    f"{versions[name]}",
                    f"{pip} install '{requirement}'",
                    "nothing",
                )
            )
    return found


def _install_tvm(pip: str, versions: Mapping[str, str]) -> str:
    """The TVM that belongs to the mlc_llm that is there: its wheel's, or for a source the tested
    one."""
    wheel = next((name for name in versions if re.match(r"mlc-llm-", name)), None)
    if wheel is None:
        return f"{pip} install apache-tvm=={TESTED_TVM} apache-tvm-ffi==0.1.14.post1"
    variant = wheel.rpartition("-")[2]
    variant = variant if re.match(r"(cpu|cu\d+|rocm\d+)$", variant) else "cpu"
    return f"{pip} install --force-reinstall {_WHEELS.format(variant)}"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition(".post")[0])[:3])


def dotted(version: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, version))
