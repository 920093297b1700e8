"""CUDA kernels on the CPU: the very source that TVM generates, compiled by g++.

Within `emulated_cuda` (or after `install_emulated_cuda`), TVM has a CUDA device and CUDA modules
that need no GPU: `tvm.compile` for a CUDA target gives modules that run, host code included, and
so do the virtual machine and its CUDA graphs. `emulate` is the short way for one kernel.

Every CUDA thread is a fiber; the threads of a block run in random order between the points where
they wait for each other, shared memory starts as NaN, asynchronous copies land at the wait that
covers them, and accesses beyond allocations and unordered accesses to shared memory end the launch
with an error (include/ and src/ say how). Not emulated: blocks that wait for each other, since
they run one after the other, and everything that only time shows.
"""

from tests.tir_kernels.cuda_emulator.device import (
    EmulatedKernel,
    Launch,
    MatrixLoads,
    counted_matrix_loads,
    emulate,
    emulated_cuda,
    install_emulated_cuda,
    load_emulated,
    planned_launches,
    remove_emulated_cuda,
    run_source,
    why_not,
)

__all__ = [
    "EmulatedKernel",
    "Launch",
    "MatrixLoads",
    "counted_matrix_loads",
    "emulate",
    "emulated_cuda",
    "install_emulated_cuda",
    "load_emulated",
    "planned_launches",
    "remove_emulated_cuda",
    "run_source",
    "why_not",
]
