"""Libraries with machine code for a GPU, made and looked at without one.

TVM's own CUDA runtime reads them, against a stub of NVIDIA's driver that takes ELF files for CUDA
only, finds functions in their symbol tables and writes down what is launched.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import cuda_stub
import pytest
from cuda_stub import StubMachine, can_be_built

from mlcawq.build.cuda_library import keeping_cuda_source
from mlcawq.build.packed_modules import (
    DeviceCode,
    PackedModules,
    pack,
    pack_device_code,
    unpack,
    unpack_device_code,
)

KERNELS = Path(cuda_stub.__file__).with_name("kernels.py")
needs_stub = pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")

_RUN = """
import sys
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
import numpy as np, tvm
from mlcawq.engine.cuda_runtime import load_cuda_runtime
driver, problem, fix = load_cuda_runtime()
assert driver is not None, problem
module = tvm.runtime.load_module(sys.argv[1])
for name, width, dtype in (("add_one", 256, "float16"), ("double_it", 64, "float32")):
    a = tvm.runtime.tensor(np.ones((5, width), dtype), device=tvm.device("cuda", 0))
    module[name](a, tvm.runtime.empty((5, width), dtype, device=tvm.device("cuda", 0)))
"""
_EXPORT = """
import runpy, sys
import tvm, tvm_ffi
assert tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> StubMachine:
    return StubMachine(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cuda_stub.kernels import export

    path = tmp_path_factory.mktemp("library") / "lib-cuda.so"
    (cubin,) = export(path, "sm_90")
    assert {kernel.name for kernel in cubin.kernels} == {"add_one_kernel", "double_it_kernel"}
    assert cubin.code in path.read_bytes()
    return path


def cuda_elf_files(data: bytes) -> list[int]:
    """The architectures of the ELF files for CUDA inside of `data`."""
    found, at = [], data.find(b"\x7fELF", 1)
    while at >= 0:
        if struct.unpack_from("<H", data, at + 18)[0] == 190:
            found.append(struct.unpack_from("<I", data, at + 48)[0] >> 8 & 0xFF)
        at = data.find(b"\x7fELF", at + 1)
    return found


def test_a_library_has_machine_code_and_no_source(library: Path) -> None:
    data = library.read_bytes()
    assert cuda_elf_files(data) == [90]
    assert b"__global__" not in data


@needs_stub
def test_tvms_own_runtime_loads_and_launches_it(machine: StubMachine, library: Path) -> None:
    answer = machine.run(_RUN, library)
    assert answer.status == 0, answer.output
    assert len(answer.named("module")) == 1
    assert {call.name for call in answer.named("function")} == {
        "add_one_kernel",
        "double_it_kernel",
    }
    launches = {call.name: call.numbers[:2] for call in answer.named("launch")}
    assert launches == {"add_one_kernel": (5, 256), "double_it_kernel": (5, 64)}


@needs_stub
def test_a_driver_that_is_there_changes_nothing(
    machine: StubMachine, library: Path, tmp_path: Path
) -> None:
    # With a driver, TVM would compile for the GPU that it finds: here an sm_80.
    again = tmp_path / library.name
    answer = machine.run(_EXPORT, KERNELS, again, "sm_90", capability=80)
    assert answer.status == 0, answer.output
    assert cuda_elf_files(again.read_bytes()) == [90]
    assert again.stat().st_size == library.stat().st_size


def test_the_variable_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TVM_COMPILE_FORCE_FALLBACK"
    monkeypatch.delenv(name, raising=False)
    with keeping_cuda_source():
        assert os.environ[name] == "1"
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    with pytest.raises(ZeroDivisionError), keeping_cuda_source():
        _ = 1 / 0
    assert os.environ[name] == "0"


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _function(name: bytes, arguments: int, tags: list[bytes], extra: int) -> bytes:
    return (
        _text(name)
        + _text(name)
        + struct.pack("<Q", arguments)
        + arguments * b"\x03\x40\x01\x00"
        + struct.pack("<Q", len(tags))
        + b"".join(map(_text, tags))
        + struct.pack("<Q", extra)
        + extra * b"\x00\x00\x00\x01"
    )


def test_packed_modules_are_taken_apart_and_put_together() -> None:
    functions = struct.pack("<Q", 2) + _function(b"f", 3, [b"blockIdx.x", b"threadIdx.x"], 3)
    functions += _function(b"gemm", 0, [], 0)
    device = _text(b"cuda") + functions + _text(b"source")
    body = struct.pack("<QQQQQ", 3, 0, 1, 1, 1) + struct.pack("<Q", 1)
    body += _text(b"_lib") + _text(b"cuda") + _text(device)
    blob = struct.pack("<Q", len(body)) + body
    packed = unpack(blob)
    assert packed == PackedModules(body[:48], (("_lib", None), ("cuda", device)))
    assert pack(packed) == blob
    code = unpack_device_code(device)
    assert code == DeviceCode("cuda", functions, ("f", "gemm"), b"source")
    assert pack_device_code(code) == device
    for damaged in (blob[:-1], blob + b"\0", b"\0" * 8 + blob[8:], blob[:4]):
        with pytest.raises(ValueError, match="packed modules"):
            unpack(damaged)
    for damaged in (device[:-1], device + b"\0", device[: len(device) // 2]):
        with pytest.raises(ValueError, match="packed modules"):
            unpack_device_code(damaged)
