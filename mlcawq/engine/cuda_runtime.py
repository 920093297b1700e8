"""TVM's CUDA runtime in this process, and why it may not work here.

TVM keeps it in a library of its own, which is linked against the CUDA runtime (libcudart) and the
driver. TVM loads it by itself only beside its compiler, and then without a word when it fails; a
process that only runs models has to load it. libcudart is found where TVM cannot see it: among the
Python packages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tvm_ffi
from tvm import libinfo

from mlcawq.engine.cuda_driver import Driver, find_driver

_INSTALL = "pip install 'mlcawq[cuda]'"
_CUDART = "libcudart.so.13"  # of the CUDA that TVM's wheel was built with
_CUDA_NEEDED = (13, 0)
_DRIVER_NEEDED = "580"  # the first driver that runs it
_LIBRARY = "libtvm_runtime_cuda.so"


@cache
def load_cuda_runtime() -> tuple[Driver | None, str, str]:
    """Make TVM able to run on NVIDIA's GPUs, once a process.

    Returns the driver with its GPUs, or None, what is wrong and what to do about it.
    """
    driver, reason = find_driver()
    if driver is None:
        return None, reason, "install NVIDIA's driver; `mlcawq doctor` looks at it again"
    if driver.version < _CUDA_NEEDED:
        return (
            None,
            "NVIDIA's driver is too old: it runs CUDA {}.{}, and {}.{} is needed".format(
                *driver.version, *_CUDA_NEEDED
            ),
            f"install driver {_DRIVER_NEEDED} or newer",
        )
    if not driver.gpus:
        return None, "NVIDIA's driver lists no GPU", "look at CUDA_VISIBLE_DEVICES"
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        problem = _load()
        if problem:
            return None, *problem
    return driver, "", ""


def _load() -> tuple[str, str] | None:
    """None, or what is wrong and what to do."""
    try:
        _load_cudart()
    except OSError as error:
        return f"the CUDA runtime cannot be loaded ({error})", _INSTALL
    places = (folder / _LIBRARY for folder in libinfo.package_lib_paths())
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        return "this TVM was built without CUDA", "pip install --force-reinstall apache-tvm==0.26.0"
    try:
        _kept.append(ctypes.CDLL(str(found)))
    except OSError as error:
        return f"TVM's CUDA runtime cannot be loaded ({error})", _INSTALL
    return None


# Libraries stay for as long as the process: TVM holds pointers into them.
_kept: list[ctypes.CDLL] = []


def _load_cudart() -> None:
    """Where the dynamic loader knows it, as TVM would; else from the package. Raises OSError."""
    try:
        _kept.append(ctypes.CDLL(_CUDART))
    except OSError:
        packaged = next(_packaged(), None)
        if packaged is None:
            raise
        _kept.append(ctypes.CDLL(str(packaged)))


def _packaged() -> Iterator[Path]:
    try:
        import nvidia
    except ImportError:
        return
    for folder in nvidia.__path__:
        yield from Path(folder).glob(f"cu13/lib/{_CUDART}")
