"""Every room has what a decoder needs, under the same names."""

from __future__ import annotations

import pytest

from tir_kernels import cpu, cuda, vulkan
from tir_kernels._tvm import Target
from tir_kernels.dispatch import kernels_for


def test_rooms_by_target() -> None:
    assert kernels_for(Target("llvm")) is cpu
    assert kernels_for(Target({"kind": "cuda", "arch": "sm_80"})) is cuda
    assert kernels_for(Target("webgpu")) is vulkan
    with pytest.raises(NotImplementedError, match="metal"):
        kernels_for(Target("metal"))


def test_rooms_have_the_same_kernels() -> None:
    assert set(cuda.__all__) == set(vulkan.__all__)
    # On CPUs MLC's engine draws tokens without a library.
    assert set(vulkan.__all__) - set(cpu.__all__) == {
        "argsort_probs",
        "multinomial_from_uniform",
        "renormalize_by_top_p",
        "sample_with_top_p",
        "sampler_take_probs",
    }
    for room in (cpu, cuda, vulkan):
        assert all(callable(getattr(room, name)) for name in room.__all__)
