"""The devices of this machine that libraries run on, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tvm
import tvm_ffi

from mlcawq.engine.artifact import DEVICE_ALIASES, DEVICES, BuiltFolder
from mlcawq.engine.cuda_runtime import load_cuda_runtime
from mlcawq.errors import Problem, UserError

_LIST = "`mlcawq doctor` lists what this machine has"


@dataclass(frozen=True)
class Device:
    """kind: as in DEVICES. tvm: TVM's name for it, which differs for kind "vulkan" where our own
    device over wgpu-native serves it (TVM: webgpu).

    software: drivers that compute on the CPU. binding_bytes: the largest tensor that a kernel can
    be handed; None where only memory limits it.
    """

    kind: str
    index: int
    tvm: Any
    software: bool = False
    binding_bytes: int | None = None

    @property
    def name(self) -> str:
        """What --device calls it."""
        return f"{self.kind}:{self.index}"

    def free_memory(self, weights: int) -> int:
        """Bytes that may be allocated, by the device's own account where it gives one.

        weights: bytes that are on it already. WebGPU tells nothing of a GPU's memory: there as
        much again as the weights take, at least 1 GiB, is believed to be free, if the system has
        it too.
        """
        system = int(psutil.virtual_memory().available)
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
    return Missing("this TVM was built without vulkan", "use another device")


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
    if (kind != "auto" and kind not in DEVICES) or (index and not index.isdigit()):
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
            f"mend one of these, or run `mlcawq compile {built.path} --target cpu`",
        ),
    )


def _has_api(kind: str) -> bool:
    return tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is not None


def _exists(device: Any) -> bool:
    try:
        return bool(device.exist)
    except Exception:  # a driver that fails while it is asked
        return False
