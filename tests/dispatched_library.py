"""Libraries whose kernels, written in C, say which variant they are of: dispatching, alone."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import tvm_ffi

from mlcawq.build.cpu_dispatch import Provided, dispatch_source, variant_symbol
from mlcawq.build.link import find_compiler
from tir_kernels.levels import architecture_named

_KERNEL = """
extern "C" int __tvm_ffi_{symbol}(void *, const TVMFFIAny *, int, TVMFFIAny *result) {{
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = {answer};
  return 0;
}}
"""


def dispatched_library(
    path: Path, variants: Sequence[tuple[str, tuple[str, ...]]], cxx: str = ""
) -> Path:
    """variants: names and features, best last. The kernel `which` returns the number of the
    variant that runs; `shared` is the first one's for all.
    """
    first = variant_symbol("shared", variants[0][0])
    provided = [
        Provided(name, features, {"which": variant_symbol("which", name), "shared": first})
        for name, features in variants
    ]
    kernels = ["#include <tvm/ffi/c_api.h>", _KERNEL.format(symbol=first, answer=-1)]
    kernels += [
        _KERNEL.format(symbol=variant.kernels["which"], answer=i)
        for i, variant in enumerate(provided)
    ]
    architecture = architecture_named(platform.machine())
    path.with_suffix(".dispatch.cc").write_text(dispatch_source(architecture, provided))
    path.with_suffix(".kernels.cc").write_text("\n".join(kernels))
    includes = (
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
    )
    sources = (path.with_suffix(".dispatch.cc"), path.with_suffix(".kernels.cc"))
    command = [cxx or find_compiler(), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{include}" for include in includes] + ["-o", str(path), *map(str, sources)]
    subprocess.run(command, check=True)
    return path
