"""The devices of this machine that libraries run on, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from mlcawq.cgroup import available_memory
from mlcawq.engine import wgpu
from mlcawq.engine.artifact import DEFAULT_LAYOUT, DEVICE_ALIASES, DEVICES, BuiltFolder
from mlcawq.engine.cuda_arch import arch_for, runs_on
from mlcawq.engine.cuda_runtime import load_cuda_runtime
from mlcawq.engine.wgpu import Limits
from mlcawq.errors import Problem, UserError

_LIST = "`mlcawq doctor` lists what this machine has"


@dataclass(frozen=True)
class Device:
    """kind: as in DEVICES. tvm: TVM's name for it, which differs for kind "vulkan" where our own
    device over wgpu-native serves it (TVM: webgpu); limits are that device's then.
    """

    kind: str
    index: int
    tvm: Any
    limits: Limits | None = None

    @property
    def name(self) -> str:
        """What --device calls it."""
        return f"{self.kind}:{self.index}"

    @property
    def software(self) -> bool:
        """Whether its driver computes on the CPU."""
        return self.limits is not None and self.limits.device_type == "software"

    @property
    def binding_bytes(self) -> int | None:
        """The largest tensor that a kernel can be handed; None where only memory limits it."""
        return None if self.limits is None else self.limits.max_storage_buffer_binding_size

    def free_memory(self, weights: int) -> int:
        """Bytes that may be allocated, by the device's own account where it gives one.

        weights: bytes that are on it already. Of a GPU that gives none, as much again as the
        weights take, at least 1 GiB, is believed to be free, if the system has it too.
        """
        system = available_memory()
        if self.kind == "cpu" or self.software:
            return system
        for account in ("available_global_memory", "total_global_memory"):
            try:
                free = getattr(self.tvm, account)
            except Exception:  # not every device can tell
                continue
            if free:
                return max(int(free) - (weights if account.startswith("total") else 0), 0)
        return min(system, max(weights, 2**30))

    def refusal(self, target: Mapping[str, Any], quantization: str) -> str:
        """Why this device cannot run what was compiled for `target` and `quantization`, as a
        library's metadata records them; empty when it can, or when no target is recorded.
        """
        kind, arch = target.get("kind"), target.get("arch")
        if self.kind == "vulkan" and kind not in (None, self.tvm.type):
            return f"it was compiled for TVM's {kind}, and this TVM has {self.tvm.type} instead"
        if self.limits is not None:
            threads = target.get("max_num_threads", 0)
            most = self.limits.max_compute_invocations_per_workgroup
            if threads > most:
                return f"it has workgroups of {threads} threads, and {self.name} allows {most}"
            if "f16" in quantization and not self.limits.shader_f16:
                return f"{quantization} computes in float16, which {self.name} does not have"
        if self.kind == "cuda" and arch:
            major, minor = self._capability
            if not runs_on(arch, (major, minor)):
                return f"it was compiled for {arch}, and {self.name} is sm_{major}{minor}"
        return ""

    @property
    def target(self) -> str:
        """What --target compiles for it."""
        arch = arch_for(self._capability) if self.kind == "cuda" else None
        return self.kind if arch is None else f"{self.kind}:{arch.name}"

    @property
    def _capability(self) -> tuple[int, int]:
        major, minor = str(self.tvm.compute_version).split(".")
        return int(major), int(minor)


@dataclass(frozen=True)
class Missing:
    """Why a device cannot be used here, in a line, and what to do about it."""

    reason: str
    fix: str


def find_device(kind: str, index: int = 0) -> Device | Missing:
    """A device of this machine, made ready for use."""
    if kind == "cuda":
        return _cuda_device(index)
    if kind == "vulkan" and not _has_api("vulkan"):
        return _wgpu_device(index)
    return _tvm_device(kind, index)


def _cuda_device(index: int) -> Device | Missing:
    driver, reason, fix = load_cuda_runtime()
    if driver is None:
        return Missing(reason, fix)
    if index >= len(driver.gpus):
        return Missing(f"there are {len(driver.gpus)} GPUs, counted from 0", _LIST)
    return _tvm_device("cuda", index)


def _wgpu_device(index: int) -> Device | Missing:
    try:
        limits = wgpu.limits(index)
    except UserError as error:
        problem = error.problems[0]
        return Missing(problem.what, problem.fix or _LIST)
    return Device("vulkan", index, tvm.device("webgpu", index), limits)


def _tvm_device(kind: str, index: int) -> Device | Missing:
    if not _has_api(kind):
        return Missing(f"this TVM was built without {kind}", "use another device")
    device = tvm.device(kind, index)
    if not _exists(device):
        return Missing(f"TVM finds no device {kind}:{index}", _LIST)
    return Device(kind, index, device)


def choose_device(built: BuiltFolder, asked: str) -> tuple[Device, Path]:
    """The device and the library for it. asked: "auto", or a kind with an optional index.

    auto takes the first of DEVICES that the folder has a library for and that is there; a Vulkan
    driver that computes on the CPU comes after the CPU's own library.
    Raises UserError when the folder has no library for it or the machine has no such device.
    """
    kind, _, index = asked.partition(":")
    kind = DEVICE_ALIASES.get(kind, kind)
    numbered = kind in DEVICES and (not index or index.isdigit())
    if asked != "auto" and not numbered:
        raise UserError.one(
            f"unknown device {asked!r}", "--device", f"use auto or one of: {', '.join(DEVICES)}"
        )
    present = ", ".join(built.libraries)
    if kind != "auto":
        if kind not in built.libraries:
            raise UserError.one(
                f"the folder has no library for {kind} (it has: {present})",
                str(built.path),
                f"run `mlcawq compile {built.path} --target {kind}`",
            )
        device = find_device(kind, int(index or 0))
        if isinstance(device, Missing):
            what = f"{asked} cannot be used on this machine: {device.reason}"
            raise UserError.one(what, "--device", device.fix)
        return device, built.libraries[kind]
    problems = []
    slow = None
    for kind in (kind for kind in DEVICES if kind in built.libraries):
        device = find_device(kind)
        if isinstance(device, Missing):
            problems.append(
                Problem(
                    f"{kind} cannot be used on this machine: {device.reason}",
                    str(built.libraries[kind]),
                    device.fix,
                )
            )
        elif device.software:
            slow = device
        else:
            return device, built.libraries[kind]
    if slow is not None:
        return slow, built.libraries[slow.kind]
    raise UserError(
        *problems,
        Problem(
            "the folder has no library that runs here",
            str(built.path),
            f"mend one of these, or run `mlcawq compile {built.path} --target {_fallback(built)}`",
        ),
    )


def _fallback(built: BuiltFolder) -> str:
    """The target that runs these weights on most machines: only GPUs run a layout made for them."""
    layout = built.config.get("weight_layout") or DEFAULT_LAYOUT
    return "cpu" if layout == DEFAULT_LAYOUT else "vulkan"


def fitting_device(
    built: BuiltFolder, device: Device, asked: str, metadata: Mapping[str, Any]
) -> Device:
    """`device` when it runs the library that has this metadata; else, where the user has named no
    number, the first of its kind that does. Raises UserError when there is none.
    """
    target = metadata.get("target") or {}
    quantization = str(metadata.get("quantization"))
    refusal, other = device.refusal(target, quantization), device
    while refusal and ":" not in asked:
        found = find_device(device.kind, other.index + 1)
        if isinstance(found, Missing):
            break
        if not found.refusal(target, quantization):
            return found
        other = found
    if refusal:
        raise UserError.one(
            f"the library cannot run on {device.name}: {refusal}",
            str(built.libraries[device.kind]),
            f"run `mlcawq compile {built.path} --target {device.target}`",
        )
    return device


def _has_api(kind: str) -> bool:
    return tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is not None


def _exists(device: Any) -> bool:
    try:
        return bool(device.exist)
    except Exception:  # a driver that fails while it is asked
        return False
