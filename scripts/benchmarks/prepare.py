"""Compiling what is measured into a folder, on any machine: the GPU's needs only to run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.libinfo import package_lib_paths

from benchmarks import generic_schedule
from benchmarks.cases import GROUP_SIZE, Linear
from benchmarks.prebuilt import CLASSES, MANIFEST, RUNTIME
from mlcawq.build.cuda_compiler import Cubin, find_cuda_compiler
from mlcawq.build.cuda_library import export_cuda_library, keeping_cuda_source
from mlcawq.build.cuda_target import cuda_target
from mlcawq.build.link import find_compiler
from tir_kernels.dispatch import w4a16_linear
from tir_kernels.layouts import AUTOAWQ, TILED

Say = Callable[[str], None]


def prepare(folder: Path, target_name: str, linears: Sequence[Linear], say: Say) -> None:
    """Write the kernels of `linears` for --target cuda[:sm_XX] into `folder`, with a manifest.

    Raises UserError where there is no compiler for the target.
    """
    target = cuda_target(target_name)
    arch = str(target.attrs["arch"])
    compiler, linker = find_cuda_compiler(arch), find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    shapes = list({linear.key: linear for linear in linears}.values())
    libraries = {}
    for name, functions in (
        ("tiled", _ours(target, shapes, TILED)),
        ("stock", _ours(target, shapes, AUTOAWQ)),
        ("generic", _generic(target, shapes)),
    ):
        say(f"compiling {len(functions)} functions of {name} for {arch}")
        module = tvm.IRModule(
            {key: f.with_attr("global_symbol", key) for key, f in functions.items()}
        )
        with keeping_cuda_source(), target:
            executable = tvm.compile(module, target=target)
        made = export_cuda_library(executable.mod, folder / f"{name}.so", arch, compiler, linker)
        libraries[name] = sorted(functions)
        say(_summary(name, made))
    copy_runtime(folder)
    manifest = {
        "arch": arch,
        "compiler": compiler.describe,
        "tvm": tvm.__version__,
        "libraries": libraries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def copy_runtime(folder: Path) -> None:
    """What of TVM the libraries in `folder` need to run."""
    for library in RUNTIME:
        places = (place / library for place in package_lib_paths())
        shutil.copy2(next(place for place in places if place.is_file()), folder / library)


def _ours(target: Any, shapes: Iterable[Linear], layout: str) -> dict[str, Any]:
    return {
        shape.key: w4a16_linear(target, shape.K, shape.N, GROUP_SIZE, layout=layout)
        for shape in shapes
    }


def _generic(target: Any, shapes: Iterable[Linear]) -> dict[str, Any]:
    return {
        f"{shape.key}_{name}": generic_schedule.scheduled(
            shape.K, shape.N, GROUP_SIZE, name, target
        )
        for shape in shapes
        for name in CLASSES
    }


def _summary(name: str, made: Iterable[Cubin]) -> str:
    kernels = [kernel for cubin in made for kernel in cubin.kernels]
    spilling = [kernel.name for kernel in kernels if kernel.spill_loads or kernel.spill_stores]
    text = (
        f"{name}: {len(kernels)} kernels, at most {max(k.registers for k in kernels)} registers, "
        f"{len(spilling)} with spills"
    )
    return f"{text} ({', '.join(spilling[:4])})" if spilling else text


def prepare_model(folder: Path, target_name: str, say: Say) -> None:
    """Add the library of the 8B-shaped model. Raises UserError as `prepare`."""
    from benchmarks.end_to_end import LIBRARY, LLAMA_8B, SIZES
    from mlcawq.build.compile import compile_model
    from mlcawq.checkpoint.config import parse_config

    say("compiling the 8B-shaped model")
    compile_model(
        parse_config(LLAMA_8B),
        folder / f"{LIBRARY}.so",
        target_name,
        **SIZES,
        weight_layout=TILED,
    )
