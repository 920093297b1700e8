"""What a device can hold, read from the attributes of its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target

# What every WebGPU device has (WebGPU specification, 3.6.2 Limits). TVM's target kind "webgpu"
# does not know the attributes for memory, so these are its values there.
WORKGROUP_BYTES = 16384
WORKGROUP_INVOCATIONS = 256
BINDING_BYTES = 2**27
# What every Vulkan device has (Vulkan specification, Required Limits); its memory is as above.
LEAST_INVOCATIONS = 128

# Added to a pointer for WebGPU devices that number addresses (mlcawq.engine.wgpu): what follows in
# the tensor may be larger than a binding, and the kernel uses no more than one of it.
WINDOW_BIT = 1 << 62


@dataclass(frozen=True)
class Limits:
    """workgroup_bytes: of workgroup memory. invocations: in a workgroup. binding_bytes: of a
    tensor, or of the part of one, that a kernel can be handed.

    Raises ValueError for less than any Vulkan device has in a workgroup.
    """

    workgroup_bytes: int = WORKGROUP_BYTES
    invocations: int = WORKGROUP_INVOCATIONS
    binding_bytes: int = BINDING_BYTES

    def __post_init__(self) -> None:
        if self.invocations < LEAST_INVOCATIONS or self.workgroup_bytes < WORKGROUP_BYTES:
            raise ValueError(
                f"workgroups of {self.invocations} invocations with {self.workgroup_bytes} bytes "
                f"are too small: {LEAST_INVOCATIONS} and {WORKGROUP_BYTES} are the least"
            )


def limits_of(target: Target) -> Limits:
    """The limits of a target of kind webgpu or vulkan, WebGPU's guaranteed ones by default.

    Where a target of kind vulkan does not say how large a binding may be, the device judges: its
    tensors cannot be split anyway (`rows_in_binding`).
    """
    attributes = target.attrs
    unknown = 2**63 if target.kind.name == "vulkan" else BINDING_BYTES
    return Limits(
        int(attributes.get("max_shared_memory_per_block", WORKGROUP_BYTES)),
        int(attributes.get("max_num_threads", WORKGROUP_INVOCATIONS)),
        int(attributes.get("max_storage_buffer_range", unknown)),
    )


def rows_in_binding(target: Target, rows: int, *row_bytes: int, multiple: int = 32) -> int:
    """How many rows of tensors go into one launch, when a row of each has `row_bytes` bytes.

    All `rows` if every tensor fits into a binding whole; else a multiple of `multiple`, which shall
    put the tensors' parts at multiples of 256 bytes, as bindings want: 32 does, or any multiple of
    it, where a row's bytes are a multiple of 8, as they must be. Raises NotImplementedError where
    tensors must be split and cannot: TVM's own Vulkan hands kernels whole buffers only, and a row
    may be too long.
    """
    limit = limits_of(target).binding_bytes
    widest = max(row_bytes)
    if rows * widest <= limit:
        return rows
    fitting = limit // widest // multiple * multiple
    if target.kind.name == "vulkan" or not fitting or any(bytes_ % 8 for bytes_ in row_bytes):
        raise NotImplementedError(
            f"a tensor of {rows} rows of {widest} bytes is larger than a storage binding of "
            f"{limit} bytes and cannot be split"
        )
    return fitting


def window_address(element: Any) -> Any:
    """The address of an element, for a kernel that is handed a part of a tensor from there on."""
    return T.handle_add_byte_offset(T.address_of(element), T.int64(WINDOW_BIT))
