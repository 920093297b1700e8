"""Two small CUDA kernels behind host functions, exported as a library: `python this OUT ARCH`."""

from __future__ import annotations

import sys
from pathlib import Path

import tvm
from tvm.script import tirx as T  # noqa: N812

from mlcawq.build.cuda_compiler import Cubin, find_cuda_compiler
from mlcawq.build.cuda_library import export_cuda_library, keeping_cuda_source
from mlcawq.build.cuda_target import cuda_target


@T.prim_func(s_tir=True)
def add_one(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "add_one", "tirx.is_scheduled": True})
    m = T.int64()
    A = T.match_buffer(a, (m, 256), "float16")
    B = T.match_buffer(b, (m, 256), "float16")
    for i in T.thread_binding(m, thread="blockIdx.x"):
        for j in T.thread_binding(256, thread="threadIdx.x"):
            with T.sblock("out"):
                vi, vj = T.axis.remap("SS", [i, j])
                B[vi, vj] = A[vi, vj] + T.float16(1)


@T.prim_func(s_tir=True)
def double_it(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "double_it", "tirx.is_scheduled": True})
    m = T.int64()
    A = T.match_buffer(a, (m, 64), "float32")
    B = T.match_buffer(b, (m, 64), "float32")
    for i in T.thread_binding(m, thread="blockIdx.x"):
        for j in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("out"):
                vi, vj = T.axis.remap("SS", [i, j])
                B[vi, vj] = A[vi, vj] * T.float32(2)


def export(path: Path, arch: str) -> list[Cubin]:
    target = cuda_target(f"cuda:{arch}")
    code = str(target.attrs["arch"])
    module = tvm.IRModule({"add_one": add_one, "double_it": double_it})
    with keeping_cuda_source(), target:
        executable = tvm.compile(module, target=target)
    return export_cuda_library(executable.mod, path, code, find_cuda_compiler(code), "g++")


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2])
