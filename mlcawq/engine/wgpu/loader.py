"""A GPU for TVM through wgpu-native, where TVM has no Vulkan of its own.

Libraries that TVM's `webgpu` code generator compiled run on `tvm.device("webgpu", i)` once `load`
has been called. Only TVM's runtime is needed, and no torch.

Environment: MLCAWQ_VULKAN_DEVICE chooses the GPU (its index among those of the driver, or a part of
its name), MLCAWQ_WGPU_BACKEND the API (vulkan, metal, dx12 or gl), MLCAWQ_WGPU_CHECKS=1 makes
kernels check every index.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mlcawq.engine.runtime_only import import_tvm_runtime
from mlcawq.engine.wgpu.native import built_library
from mlcawq.errors import UserError

WINDOW_BIT = 1 << 62  # in a device address; see `window`

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Limits:
    """A GPU and what a kernel may ask of it. Sizes in bytes."""

    name: str
    driver: str
    backend: str  # vulkan, metal, dx12 or gl
    device_type: str  # discrete, integrated, software or unknown
    vendor_id: int
    device_id: int
    shader_f16: bool
    subgroups: bool
    max_storage_buffer_binding_size: int  # what a kernel can see of one buffer
    max_buffer_size: int
    max_compute_workgroup_storage_size: int
    max_compute_invocations_per_workgroup: int
    max_compute_workgroup_size_x: int
    max_compute_workgroup_size_y: int
    max_compute_workgroup_size_z: int
    max_compute_workgroups_per_dimension: int
    max_storage_buffers_per_shader_stage: int
    min_storage_buffer_offset_alignment: int


def load() -> None:
    """Make `tvm.device("webgpu", i)` work, compiling the runtime if this is its first use.

    Raises UserError when something is missing: the package wgpu, a C++ compiler, a driver.
    """
    if not adapters():
        raise no_adapter()


def adapters() -> tuple[Limits, ...]:
    """The machine's GPUs in the order of TVM's device indices, best first; empty without a driver.

    Raises UserError when the runtime cannot be compiled or a setting names no GPU.
    """
    names = {field.name for field in fields(Limits)}
    query = _function("mlcawq.wgpu.adapters")
    try:
        found = json.loads(str(query()))
    except ValueError as error:  # a setting that means nothing on this machine
        raise UserError.one(str(error)) from error
    return tuple(Limits(**{k: v for k, v in one.items() if k in names}) for one in found)


def limits(device: int = 0) -> Limits:
    """What the GPU with that TVM device index can do. Raises UserError when there is none."""
    found = adapters()
    if device >= len(found):
        raise no_adapter() if not found else _no_such(device, found)
    return found[device]


def statistics(device: int = 0) -> dict[str, int]:
    """Memory (allocated_bytes, allocations, reserved_bytes) and work (dispatches, submissions)."""
    return {str(k): int(v) for k, v in _function("mlcawq.wgpu.statistics")(device).items()}


def window(
    tensor: Any, shape: Sequence[int], dtype: str | None = None, byte_offset: int = 0
) -> Any:
    """A part of a tensor that kernels may take although the whole is larger than one binding.

    A kernel sees of it, and of what lies behind it in the same allocation, at most
    `max_storage_buffer_binding_size` bytes; byte_offset is a multiple of
    `min_storage_buffer_offset_alignment`. The tensor stays alive with the window. Host code
    compiled by TVM marks a pointer as a window by adding WINDOW_BIT to it.
    """
    import tvm_ffi

    make = _function("mlcawq.wgpu.window")
    return make(tensor, tvm_ffi.Shape(list(shape)), dtype or tensor.dtype, byte_offset)


def no_adapter() -> UserError:
    """Why no GPU is found, as far as can be told."""
    if sys.platform.startswith("linux") and not ctypes.util.find_library("vulkan"):
        return UserError.one(
            "the Vulkan loader libvulkan.so.1 is not installed",
            fix="install it and a driver (Debian: apt install libvulkan1 mesa-vulkan-drivers)",
        )
    return UserError.one(
        "no Vulkan driver offers a device",
        fix="install your GPU's Vulkan driver, or Mesa's, which can also run in software "
        "(Debian: apt install mesa-vulkan-drivers)",
    )


def _no_such(device: int, found: tuple[Limits, ...]) -> UserError:
    names = ", ".join(f"{i}: {one.name}" for i, one in enumerate(found))
    return UserError.one(f"there is no Vulkan device {device}; this machine has {names}")


def _function(name: str) -> Any:
    global _library
    with _lock:
        if _library is None:
            import_tvm_runtime()
            _library = ctypes.CDLL(str(built_library()))
    import tvm_ffi

    return tvm_ffi.get_global_func(name)
