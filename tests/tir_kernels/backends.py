"""The targets that a kernel is tested on: the CPU, emulated CUDA, Vulkan."""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tir_kernels.cuda_emulator import emulate, why_not
from tests.tir_kernels.kernels import HOST, Kernel
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm
from tir_kernels.dispatch import kernels_for

CUDA = Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
WEBGPU = Target({"kind": "webgpu"}, host={"kind": "llvm"})


@dataclass(frozen=True)
class Backend:
    """name: "cpu", "cuda" or "vulkan". kernels: the room of tir_kernels that serves it."""

    name: str
    target: Target

    @property
    def kernels(self) -> ModuleType:
        return kernels_for(self.target)

    def compile(self, function: PrimFunc) -> Any:
        """What is called with numpy arrays, and fills the outputs among them in place."""
        if self.name == "cpu":
            return Kernel(function, self.target)
        if self.name == "cuda":
            return emulate(function, self.target)
        return VulkanKernel(function, self.target)


class VulkanKernel:
    """A function that runs on this machine's first Vulkan device; used as `kernels.Kernel`."""

    def __init__(self, function: PrimFunc, target: Target) -> None:
        module = IRModule({"main": function.with_attr("global_symbol", "main")})
        with target:
            self.function = tvm.compile(module, target=target)["main"]

    def __call__(self, *arguments: Any) -> None:
        device = _vulkan().tvm
        tensors = [
            tvm.runtime.tensor(a, device) if isinstance(a, np.ndarray) else a for a in arguments
        ]
        self.function(*tensors)
        for given, tensor in zip(arguments, tensors, strict=True):
            if isinstance(given, np.ndarray):
                given[...] = tensor.numpy()


@functools.cache
def _vulkan() -> Any:
    from mlcawq.engine.devices import find_device

    return find_device("vulkan")


_BACKENDS = {
    "cpu": Backend("cpu", HOST),
    "cuda": Backend("cuda", CUDA),
    "vulkan": Backend("vulkan", WEBGPU),
}


def backend_named(name: str) -> Backend:
    """Skips the test where this machine has no such device."""
    if name == "vulkan":
        from mlcawq.engine.devices import Missing

        if isinstance(_vulkan(), Missing):
            pytest.skip(f"no Vulkan device: {_vulkan().reason}")
    if name == "cuda" and why_not() is not None:
        pytest.skip(f"no emulated CUDA: {why_not()}")
    return _BACKENDS[name]


class Random(np.random.Generator):
    """Fresh inputs each run; `seed` belongs into the message of an assertion about them."""

    def __init__(self) -> None:
        self.seed = secrets.randbits(32)
        super().__init__(np.random.PCG64(self.seed))

    def floats(self, *shape: int, dtype: Any = "float16") -> np.ndarray:
        return self.standard_normal(shape).astype(dtype)
