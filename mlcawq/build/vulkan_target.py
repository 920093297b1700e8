"""TVM's target for GPUs that are reached through Vulkan.

Where the installed TVM has a Vulkan backend of its own, that is used. Otherwise code is generated
as WGSL (TVM's kind webgpu), for our device over wgpu-native (`mlcawq.engine.wgpu`). That code stays
within the limits that WebGPU guarantees, and so runs on every GPU that has its type of activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlcawq.errors import Problem, UserError
from tir_kernels.layouts import TILED

if TYPE_CHECKING:
    from mlcawq.build.weight_plan import Parameter
    from mlcawq.graph._tvm import Target

PORTABLE = "vulkan:portable"
# Host code calls kernels and nothing else: any machine of this kind may run it.
_HOST = {"kind": "llvm"}


def vulkan_target(name: str) -> Target:
    """`vulkan`: for the GPU of this machine, or for any where there is none; `vulkan:portable`:
    for any, whatever is here.

    Raises UserError for anything else after the colon.
    """
    if name not in ("vulkan", PORTABLE):
        raise UserError.one(
            f"target {name} is not known",
            "--target",
            "use vulkan (this machine's GPU) or vulkan:portable (any GPU)",
        )
    if _has_own_vulkan():
        return _target(_own_attributes(portable=name == PORTABLE), name)
    return _target({"kind": "webgpu"}, name)


def check_type(name: str, quantization: str) -> None:
    """Raises UserError where `--target vulkan` means a GPU that lacks the type of activations."""
    from mlcawq.engine.devices import Device, find_device

    device = find_device("vulkan") if name == "vulkan" else None
    if isinstance(device, Device) and (refusal := device.refusal({}, quantization)):
        raise UserError.one(
            f"the library would not run on this machine: {refusal}",
            "--target vulkan",
            f"use --quantization {quantization.replace('f16', 'f32')}, or --target {PORTABLE} to "
            "build for another GPU",
        )


def binding_problems(target: Target, parameters: Iterable[Parameter]) -> list[Problem]:
    """The 4-bit weights in the stock layout that no kernel could be handed whole."""
    from tir_kernels.vulkan.limits import limits_of

    limit = limits_of(target).binding_bytes
    large = [
        parameter
        for parameter in parameters
        if parameter.name.endswith(".qweight")
        and parameter.relayout is None
        and parameter.nbytes > limit
    ]
    if not large:
        return []
    most = max(large, key=lambda parameter: parameter.nbytes)
    others = f" (and {len(large) - 1} more)" if len(large) > 1 else ""
    what = f"{most.name}{others} has {most.nbytes} bytes; a storage binding holds {limit}"
    fix = f"leave --weight-layout out: in the layout {TILED} weights are handed over in parts"
    return [Problem(what, "--weight-layout", fix)]


def vulkan_target_from_json(given: dict[str, Any], text: str) -> Target:
    """A target of kind webgpu or vulkan; text: how it was written, for messages.

    Raises UserError for attributes that TVM does not know, and for kind vulkan where TVM was built
    without it.
    """
    if given["kind"] == "vulkan" and not _has_own_vulkan():
        raise UserError.one(
            "the installed TVM was built without Vulkan",
            "--target",
            "use --target vulkan, which then goes through WGSL, or kind webgpu",
        )
    return _target(given, text)


def _target(attributes: dict[str, Any], text: str) -> Target:
    from mlcawq.graph._tvm import Target

    try:
        return Target({"host": _HOST, **attributes})
    except Exception as error:
        raise UserError.one(
            f"TVM does not accept the target {text}: {str(error).splitlines()[0]}"
        ) from None


def _has_own_vulkan() -> bool:
    from mlcawq.graph._tvm import tvm

    return tvm.get_global_func("target.build.vulkan", allow_missing=True) is not None


def _own_attributes(*, portable: bool) -> dict[str, Any]:
    """For TVM's own Vulkan, which refuses float16 unless it is told that the device has it."""
    from mlcawq.engine.devices import Device, find_device

    if not portable and isinstance(find_device("vulkan"), Device):
        return {"kind": "vulkan", "from_device": 0}
    has = ("float16", "int8", "int16", "8bit_buffer", "16bit_buffer")
    return {"kind": "vulkan", **{f"supports_{feature}": True for feature in has}}
