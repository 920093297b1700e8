"""TVM's target for NVIDIA GPUs, from what --target says or from the GPU of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlcawq.engine.cuda_arch import CUDA_ARCHS, CudaArch, arch_for
from mlcawq.engine.cuda_driver import find_driver
from mlcawq.errors import UserError

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

# Host code calls kernels and nothing else: any machine of this kind may run it.
_HOST = {"kind": "llvm"}
# The same on all of them. Shared memory is what a kernel has without asking for more: TVM's own
# schedules take it all for granted; ours know what each architecture grants on request.
_LIMITS = {
    "max_threads_per_block": 1024,
    "max_num_threads": 1024,
    "thread_warp_size": 32,
    "max_shared_memory_per_block": 48 * 1024,
}


def cuda_target(name: str) -> Target:
    """`cuda` (the GPU of this machine) or `cuda:sm_XX` as a TVM target.

    Raises UserError for an architecture that is not known, and for `cuda` without a GPU.
    """
    arch = name.partition(":")[2]
    return _target(_named(arch, name) if arch else _present(), {})


def cuda_target_from_json(given: dict[str, Any], text: str) -> Target:
    """A target of kind cuda in JSON; what it leaves out is filled in as for `cuda:sm_XX`.

    text: how it was written, for messages. Raises UserError as `cuda_target`, and for attributes
    that TVM does not know.
    """
    arch = given.get("arch")
    if arch is not None and not isinstance(arch, str):
        raise UserError.one(f"the arch of target {text} is no text", fix=_example())
    return _target(_named(arch, text) if arch else _present(), given)


def _target(arch: CudaArch, given: dict[str, Any]) -> Target:
    from mlcawq.graph._tvm import Target

    attributes = {
        "host": _HOST,
        **_LIMITS,
        **given,
        "kind": "cuda",
        "arch": arch.code,
    }
    try:
        return Target(attributes)
    except Exception as error:
        raise UserError.one(
            f"TVM does not accept the target {given}: {str(error).splitlines()[0]}"
        ) from None


def _named(arch: str, asked: str) -> CudaArch:
    for known in CUDA_ARCHS.values():
        if arch in (known.name, known.code):
            return known
    raise UserError.one(
        f"target {asked} names no GPU architecture that is known here",
        "--target",
        f"use cuda:sm_XX with one of\n{_table()}",
    )


def _present() -> CudaArch:
    """The architecture of the first GPU, which is the one that engines use."""
    driver, reason = find_driver()
    if driver is None or not driver.gpus:
        raise UserError.one(
            f"this machine has no NVIDIA GPU to compile for ({reason or 'the driver lists none'})",
            "--target cuda",
            f"name the GPU that shall run the library, {_example()}; one of\n{_table()}",
        )
    gpu = driver.gpus[0]
    arch = arch_for(gpu.capability)
    if arch is None:
        raise UserError.one(
            f"the GPU here ({gpu.name}, {gpu.arch}) is older or newer than those known",
            "--target cuda",
            f"name one of\n{_table()}",
        )
    return arch


def _example() -> str:
    return "for example --target cuda:sm_90"


def _table() -> str:
    return "\n".join(f"     {arch.name:<8} {arch.gpus}" for arch in CUDA_ARCHS.values())
