"""CUDA kernels on the CPU: the very source that TVM generates, compiled by g++.

`install_emulated_cuda` gives TVM a CUDA device and CUDA modules that need no GPU; after it,
`tvm.compile` for a CUDA target gives modules that run, host code included. Every CUDA thread is a
fiber; the threads of a block run in random order between the points where they wait for each
other, shared memory starts as NaN, asynchronous copies land at the wait that covers them, and
accesses beyond allocations and unordered accesses to shared memory end the launch with an error
(include/ and src/ say how).
"""

from tests.tir_kernels.cuda_emulator.device import (
    EmulatedKernel,
    emulate,
    install_emulated_cuda,
    load_emulated,
    run_source,
)

__all__ = [
    "EmulatedKernel",
    "emulate",
    "install_emulated_cuda",
    "load_emulated",
    "run_source",
]
