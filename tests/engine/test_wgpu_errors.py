"""What goes wrong on the WebGPU device becomes an exception, and the process goes on."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from wgpu_for_tests import needs_vulkan, output, run_python

from mlcawq.engine import wgpu

pytestmark = needs_vulkan

FILL = """
@group(0) @binding(0) var<storage, read_write> out : array<f32>;
struct Args { value : f32, last : u32 }
@group(0) @binding(1) var<uniform> args : Args;
@compute @workgroup_size(1) fn fill(@builtin(workgroup_id) block : vec3<u32>) {
  out[block.x] = args.value;
}
"""


def module(wgsl: str, name: str = "fill") -> tvm.runtime.Module:
    """A library of one kernel (out, value; blocks), in the form in which TVM saves it."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    handle, float32 = struct.pack("<BBH", 3, 64, 1), struct.pack("<BBH", 2, 32, 1)
    info = text(name) + text(name) + struct.pack("<Q", 2) + handle + float32
    info += struct.pack("<Q", 2) + text("blockIdx.x") + text("paramWriteAccess:[1]")
    info += struct.pack("<Q", 0)
    saved = struct.pack("<Q", 1) + info + struct.pack("<Q", 1) + text(name) + text(wgsl)
    return tvm.get_global_func("ffi.Module.load_from_bytes.webgpu")(saved)


@pytest.fixture
def out() -> tvm.runtime.Tensor:
    wgpu.load()
    return tvm.runtime.empty((4,), "float32", device=tvm.device("webgpu", 0))


@pytest.fixture
def fill():
    """A kernel that works, before and after what a test breaks."""
    wgpu.load()
    return module(FILL)["fill"]


def call(kernel, tensor: tvm.runtime.Tensor, value: float, blocks: int) -> None:
    """As host code calls a kernel: with the tensor's address, scalars, and its grid."""
    kernel(ctypes.c_void_p(tensor.data_ptr()), value, blocks)


def works(kernel, tensor: tvm.runtime.Tensor) -> bool:
    call(kernel, tensor, 7.0, 4)
    return bool((tensor.numpy() == 7).all())


def test_code_that_is_no_wgsl(fill, out) -> None:
    assert works(fill, out)
    broken = module(FILL.replace("block.x", "block.w"))["fill"]
    with pytest.raises(RuntimeError, match=r"while compiling the kernel 'fill'(.|\n)*block\.w"):
        call(broken, out, 1.0, 4)
    with pytest.raises(RuntimeError, match="while compiling the kernel 'fill'"):
        call(broken, out, 1.0, 4)
    assert works(fill, out)


def test_a_kernel_that_asks_for_more_than_the_gpu_has(fill, out) -> None:
    limits = wgpu.limits()
    words = limits.max_compute_workgroup_storage_size // 16 + 1
    greedy = f"var<workgroup> many : array<vec4<f32>, {words}>;" + FILL.replace(
        "= args.value", "= many[block.x].x + args.value"
    )
    with pytest.raises(RuntimeError, match=r"'fill' takes .* bytes of workgroup memory"):
        call(module(greedy)["fill"], out, 1.0, 4)
    crowd = FILL.replace("@workgroup_size(1)", "@workgroup_size(1, 1, 100000)")
    with pytest.raises(RuntimeError, match="while compiling the kernel 'fill'"):
        call(module(crowd)["fill"], out, 1.0, 4)
    assert works(fill, out)


def test_an_address_that_is_none(fill, out) -> None:
    host = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="no memory of the GPU"):
        fill(ctypes.c_void_p(host.ctypes.data), 1.0, 4)
    with pytest.raises(ValueError, match="no memory of the GPU"):
        fill(ctypes.c_void_p(0), 1.0, 4)
    with pytest.raises(ValueError, match="starts 4 bytes into its allocation"):
        fill(ctypes.c_void_p(out.data_ptr() + 4), 1.0, 4)
    assert works(fill, out)


def test_wrong_arguments(fill, out) -> None:
    with pytest.raises(ValueError, match="called with 1 arguments instead of 3"):
        fill(ctypes.c_void_p(out.data_ptr()))
    with pytest.raises(TypeError):
        call(fill, out, "seven", 4)
    assert works(fill, out)


def test_saved_kernels_that_are_cut_short() -> None:
    wgpu.load()
    load = tvm.get_global_func("ffi.Module.load_from_bytes.webgpu")
    with pytest.raises(ValueError, match="compile the library again"):
        load(b"\x01" + bytes(20))


def test_a_kernel_that_is_not_there() -> None:
    wgpu.load()
    with pytest.raises(AttributeError):
        module(FILL)["empty"]


# A stand-in for the Vulkan loader that passes everything on to the real one and, once told to,
# reports the device lost: the only way to lose a GPU that works.
LOSING_LOADER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
typedef void (*Function)(void);
typedef Function (*Get)(void*, const char*);
static Get get_of_instance, get_of_device;
static int (*submit)(void*, unsigned, const void*, void*);
static int (*wait)(void*, const void*, unsigned long);
static int loses(const char* where) {
  const char* told = getenv("LOSE_GPU_AT");
  return told && !strcmp(told, where);
}
static int losing_submit(void* queue, unsigned count, const void* submits, void* fence) {
  return loses("submit") ? -4 : submit(queue, count, submits, fence);
}
static int losing_wait(void* device, const void* info, unsigned long timeout) {
  return loses("wait") ? -4 : wait(device, info, timeout);
}
static Function from_device(void* device, const char* name) {
  Function found = get_of_device(device, name);
  if (found && !strcmp(name, "vkQueueSubmit")) {
    submit = (void*)found;
    return (Function)losing_submit;
  }
  if (found && !strncmp(name, "vkWaitSemaphores", 16)) {
    wait = (void*)found;
    return (Function)losing_wait;
  }
  return found;
}
Function vkGetInstanceProcAddr(void* instance, const char* name) {
  if (!get_of_instance) {
    void* real = dlopen(getenv("REAL_VULKAN"), RTLD_NOW | RTLD_LOCAL);
    get_of_instance = (Get)dlsym(real, "vkGetInstanceProcAddr");
  }
  Function found = get_of_instance(instance, name);
  if (found && !strcmp(name, "vkGetDeviceProcAddr")) {
    get_of_device = (Get)found;
    return (Function)from_device;
  }
  return found;
}
"""

LOSE = """
import os, sys
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from test_wgpu_errors import FILL, call, module
import numpy as np, tvm
from mlcawq.engine import wgpu
wgpu.load()
out = tvm.runtime.empty((4,), "float32", device=tvm.device("webgpu", 0))
fill = module(FILL)["fill"]
call(fill, out, 7.0, 4)
assert (out.numpy() == 7).all()
os.environ["LOSE_GPU_AT"] = sys.argv[1]
for attempt in (
    lambda: [call(fill, out, 1.0, 4), out.numpy()],
    lambda: call(fill, out, 1.0, 4),
    lambda: out.numpy(),
    lambda: out.device.sync(),
    lambda: out.copyfrom(np.zeros(4, "float32")),
    lambda: tvm.runtime.empty((4,), "float32", device=out.device),
):
    try:
        attempt()
    except RuntimeError as error:
        assert "cannot be used any more" in str(error), error
    else:
        raise AssertionError("no exception")
del out
print("goes on")
"""


@pytest.mark.parametrize("where", ["submit", "wait"])
def test_a_lost_device_is_an_exception_and_no_end(tmp_path: Path, where: str) -> None:
    real = Path("/proc/self/maps").read_text()
    paths = [line.split()[-1] for line in real.splitlines() if "libvulkan.so" in line]
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not paths or not compiler:
        pytest.skip("needs a C compiler and a Vulkan loader that is a shared library")
    (tmp_path / "loader.c").write_text(LOSING_LOADER)
    shim = tmp_path / "libvulkan.so.1"
    command = [compiler, "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "loader.c"), "-ldl"]
    subprocess.run(command, check=True)
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "REAL_VULKAN": paths[0]}
    environment["RUST_BACKTRACE"] = "0"
    assert output(run_python(LOSE, where, **environment)) == "goes on\n"
