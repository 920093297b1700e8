"""TVM's target for processors: this machine's, or one that is described in JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.errors import UserError

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target


def cpu_target() -> Target:
    """This machine's processor, with the features that it really has."""
    from mlcawq.graph._tvm import Target, tvm

    codegen = tvm.target.codegen
    target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    missing = _missing_features(str(feature) for feature in codegen.llvm_get_cpu_features(target))
    if missing:
        target = Target({"kind": "llvm", "mcpu": target.attrs["mcpu"], "mattr": missing})
    return target


def _missing_features(promised: Iterable[str]) -> list[str]:
    """LLVM's switches for what a processor's name promises and this machine does not offer.

    Virtual machines often hide AVX-512; code that uses it would die of an illegal instruction.
    Where the machine's features cannot be listed, the name is believed.
    """
    flags = _machine_flags()
    vector = [name for name in promised if name.startswith(("avx", "fma", "f16c"))]
    return sorted(f"-{name}" for name in vector if flags and name not in flags)


def _machine_flags() -> set[str]:
    """The x86 features that Linux lists, spelled as LLVM does (avx512vnni); else none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].replace("_", "").split())
    return set()


def cpu_target_from_json(given: dict[str, Any], text: str) -> Target:
    """A target of kind llvm; text: how it was written, for messages.

    Raises UserError for attributes that TVM does not know, and for another architecture.
    """
    from mlcawq.graph._tvm import Target

    try:
        resolved = Target(given)
    except Exception as error:
        raise UserError.one(
            f"TVM does not accept the target {text}: {str(error).splitlines()[0]}"
        ) from None
    _require_native(given, text)
    return resolved


def _require_native(given: dict[str, Any], target: str) -> None:
    triple = str(given.get("mtriple", ""))
    machine = platform.machine().lower()
    native = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    if triple and triple.split("-")[0].replace("arm64", "aarch64") != native.get(machine, machine):
        raise UserError.one(
            f"target {target} is for another architecture than this machine ({machine})",
            fix="build on a machine of that architecture; cross-compiling is not supported",
        )
