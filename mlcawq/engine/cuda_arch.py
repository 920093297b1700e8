"""NVIDIA's GPU architectures: their names, and whose machine code runs where."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CudaArch:
    """name: sm_XX as users write it. code: what compilers are told; a trailing "a" allows what
    this architecture alone has.
    """

    name: str
    code: str
    gpus: str


# sm_90 is compiled as sm_90a, which wgmma needs; it gives up nothing, as no other chip is 9.x.
_ARCHS = (
    CudaArch("sm_75", "sm_75", "T4, RTX 20"),
    CudaArch("sm_80", "sm_80", "A100, A30"),
    CudaArch("sm_86", "sm_86", "RTX 30, A10, A40"),
    CudaArch("sm_87", "sm_87", "Jetson Orin"),
    CudaArch("sm_89", "sm_89", "RTX 40, L4, L40"),
    CudaArch("sm_90", "sm_90a", "H100, H200"),
    CudaArch("sm_100", "sm_100", "B100, B200"),
    CudaArch("sm_120", "sm_120", "RTX 50, RTX PRO 6000"),
)
CUDA_ARCHS = {arch.name: arch for arch in _ARCHS}
_TEGRA = {(8, 7)}  # systems on a chip: they and the cards do not run each other's machine code


def capability_of(arch: str) -> tuple[int, int]:
    """(major, minor) of an sm_XX, with or without a suffix. Raises ValueError for others."""
    match = re.fullmatch(r"sm_(\d+)(\d)[af]?", arch)
    if match is None:
        raise ValueError(f"{arch!r} is not of the form sm_XX")
    return int(match[1]), int(match[2])


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for `arch` runs on a GPU of that compute capability.

    Code runs on its own major version from its own minor version on; with the suffix "a", and on
    systems on a chip, on exactly its own.
    """
    own = capability_of(arch)
    if arch.endswith("a") or own in _TEGRA or capability in _TEGRA:
        return capability == own
    return capability[0] == own[0] and capability[1] >= own[1]


def arch_for(capability: tuple[int, int]) -> CudaArch | None:
    """The architecture to compile for to run on such a GPU: the nearest of those known."""
    fitting = [arch for arch in _ARCHS if runs_on(arch.code, capability)]
    return fitting[-1] if fitting else None
