"""The kernels of a CPU library: generated for each variant, once where variants can share them.

The graph is built for every variant, since kernels choose their blocks by the target's features;
what it computes with them is the same, and is checked to be. LLVM works on one variant while the
graph of the next is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm_ffi

from mlcawq.build.cpu_dispatch import Provided, variant_symbol
from mlcawq.build.cpu_target import Variant
from mlcawq.graph._tvm import IRModule, PrimFunc, Target, tvm
from mlcawq.graph.pipeline import bytecode_of, compiling
from tir_kernels.levels import level_named


@dataclass(frozen=True)
class Kernels:
    """objects: files to be linked in this order. provided: what the variants are, best last.
    executable: TVM's, of the graph without kernels.
    """

    objects: tuple[Path, ...]
    provided: tuple[Provided, ...]
    executable: Any


def generate_kernels(
    variants: Sequence[Variant],
    lower: Callable[[Variant], IRModule],
    folder: Path,
    say: Callable[[str], None],
) -> Kernels:
    """Object files in `folder` with the kernels of all variants.

    variants: best last. lower: a variant -> the module after all of Relax's passes. say:
    told what is waited for.
    Raises RuntimeError when two variants' graphs differ, a fault of the kernels.
    """
    made: dict[str, _Lowered] = {}
    bytecode = b""
    provided: dict[str, Provided] = {}
    objects: list[Future[Path]] = []
    with ThreadPoolExecutor(len(variants)) as pool:
        for variant in variants:
            lowered = _Lowered(lower(variant), variant.target)
            bytecode = bytecode or lowered.bytecode
            if lowered.bytecode != bytecode:
                raise RuntimeError(f"the graph for {variant.name} is not the other variants' one")
            shared = {}
            for name, function in lowered.kernels.items():
                before = _as_good(variant, function, list(made))
                if before and _same_kernel(function, made[before].kernels[name]):
                    shared[name] = provided[before].kernels[name]
            own = {name: variant_symbol(name, variant.name) for name in lowered.kernels}
            kernels = {**own, **shared}
            new = {own[name]: f for name, f in lowered.kernels.items() if name not in shared}
            if new:
                path = folder / f"{len(objects)}.o"
                objects.append(pool.submit(_generate, new, variant.target, path))
            made[variant.name] = lowered
            provided[variant.name] = Provided(variant.name, variant.features, kernels)
        say("code")
        # The lowest variant's first: code that several objects have (float16 <-> float32, for
        # processors without F16C) is taken from the first of them.
        files = tuple(future.result() for future in objects)
    return Kernels(files, tuple(provided.values()), made[variants[0].name].executable)


class _Lowered:
    """A module after Relax's passes: kernels, and the graph that calls them as bytecode."""

    def __init__(self, module: IRModule, target: Target) -> None:
        self.executable = bytecode_of(module, target)
        pack = tvm.get_global_func("runtime.ModulePackImportsToTensor")
        self.bytecode: bytes = pack(self.executable.mod).numpy().tobytes()
        self.kernels: dict[str, PrimFunc] = {
            variable.name_hint: function
            for variable, function in module.functions_items()
            if isinstance(function, PrimFunc)
        }


def _same_kernel(one: PrimFunc, other: PrimFunc) -> bool:
    """Whether two kernels are the same but for the target."""
    return bool(tvm_ffi.structural_equal(one.without_attr("target"), other.without_attr("target")))


def _as_good(variant: Variant, function: PrimFunc, before: list[str]) -> str:
    """Whose code of this kernel, of those `before`, `variant` can run as fast as its own; empty for
    nobody's. A kernel without a schedule, TVM's, is one that time is not spent in.
    """
    if before and not function.attrs.get("tirx.is_scheduled"):
        return before[0]
    level = level_named(variant.name)
    return level.extends if level is not None and level.extends in before else ""


def _generate(functions: dict[str, PrimFunc], target: Target, path: Path) -> Path:
    module = IRModule(
        {
            tvm.ir.GlobalVar(symbol): function.with_attr("global_symbol", symbol)
            for symbol, function in functions.items()
        }
    )
    with compiling(target):
        tvm.tirx.build(module, target=target).write_to_file(str(path))
    return path
