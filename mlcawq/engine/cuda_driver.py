"""NVIDIA's driver, asked directly: which GPUs there are, before any CUDA library is loaded.

Only libcuda is needed, which comes with the driver; no context is made on a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver numbers it. capability: (major, minor); memory: bytes in all."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def arch(self) -> str:
        """The name that compilers have for it: sm_86."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Driver:
    """version: the newest CUDA that this driver runs, (major, minor)."""

    version: tuple[int, int]
    gpus: tuple[Gpu, ...]


def find_driver() -> tuple[Driver | None, str]:
    """The driver and its GPUs, or None and why there is none, in one line."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None, "no NVIDIA driver is installed"
    status = cuda.cuInit(0)
    if status:
        return None, f"NVIDIA's driver does not start: {_error(cuda, status)}"
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    status = cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return None, f"NVIDIA's driver finds no GPU: {_error(cuda, status)}"
    version = (number.value // 1000, number.value % 1000 // 10)
    return Driver(version, tuple(_gpu(cuda, i) for i in range(count.value))), ""


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(index, name.value.decode(), (major.value, minor.value), memory.value)


def _error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    if cuda.cuGetErrorName(status, ctypes.byref(text)) or text.value is None:
        return f"error {status}"
    return text.value.decode()
