"""What --target says -> TVM's target: one resolver for each kind of device."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlcawq.build.cpu_target import cpu_target, cpu_target_from_json
from mlcawq.build.cuda_target import cuda_target, cuda_target_from_json
from mlcawq.build.vulkan_target import vulkan_target, vulkan_target_from_json
from mlcawq.errors import UserError

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

# TVM's kinds that there are kernels for, and the device that runs each.
_DEVICES = {"llvm": "cpu", "cuda": "cuda", "vulkan": "vulkan", "webgpu": "vulkan"}
# Asking for one of these is no mistake of spelling, so it gets an answer of its own.
_WITHOUT_KERNELS = ("metal", "rocm", "opencl")
_FORMS = "cpu, cpu:native, cpu:LEVEL, cuda, cuda:sm_XX, vulkan, vulkan:portable"


def resolve_target(target: str) -> Target:
    """TVM's target for one of `_FORMS`, or a TVM target in JSON.

    Of the several that a library for "cpu" is compiled for it is the best one that runs here.

    Raises UserError for a target that is not known or has no kernels, for JSON that is not valid,
    and where the target is to be found from a device that is not here.
    """
    kind = target.partition(":")[0]
    if kind == "cpu":
        return cpu_target(target)
    if kind == "cuda":
        return cuda_target(target)
    if kind == "vulkan":
        return vulkan_target(target)
    if kind in _WITHOUT_KERNELS:
        raise _no_kernels(kind)
    return _from_json(target)


def _from_json(target: str) -> Target:
    try:
        given = json.loads(target)
    except json.JSONDecodeError as error:
        raise UserError.one(
            f"target {target!r} is none of {_FORMS}, nor a TVM target in JSON ({error.msg})",
            "--target",
            'for example --target \'{"kind": "llvm", "mcpu": "x86-64-v3"}\'',
        ) from None
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind not in _DEVICES:
        raise _no_kernels(kind) if isinstance(kind, str) else _no_kind(target)
    resolvers: dict[str, Any] = {
        "cpu": cpu_target_from_json,
        "cuda": cuda_target_from_json,
        "vulkan": vulkan_target_from_json,
    }
    return resolvers[_DEVICES[kind]](given, target)


def _no_kernels(kind: str) -> UserError:
    return UserError.one(
        f"target {kind} is not supported: kernels exist for {', '.join(_DEVICES)}",
        "--target",
        f"use one of {_FORMS}",
    )


def _no_kind(target: str) -> UserError:
    return UserError.one(
        f"target {target} names no kind",
        "--target",
        'for example --target \'{"kind": "llvm", "mcpu": "x86-64-v3"}\'',
    )


def target_record(target: Target) -> dict[str, Any]:
    """What a library's metadata says of the target: TVM's attributes, without the host's."""
    recorded = json.loads(str(target))
    return {key: value for key, value in recorded.items() if key not in ("host", "tag", "keys")}


def target_device(target: Target) -> str:
    """The kind of device that runs what is compiled for `target`: cpu, cuda or vulkan.

    It is also the library's name: lib-<device>.so.
    """
    return _DEVICES[target.kind.name]
