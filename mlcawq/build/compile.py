"""Model config -> the library lib-<target>.so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.build.cpu_target import Variant, cpu_variants, variant_of
from mlcawq.build.cuda_compiler import KernelReport
from mlcawq.build.link import find_tools
from mlcawq.build.targets import resolve_target, target_device, target_record
from mlcawq.checkpoint.config import ModelConfig
from mlcawq.errors import UserError
from mlcawq.graph.roundings import EXACT, Roundings, check_roundings
from mlcawq.graph.settings import (
    check_dtype,
    check_layout,
    compile_settings,
    infer_quantization,
)
from mlcawq.graph.tables import PLAIN, Tables, check_tables

if TYPE_CHECKING:
    from mlcawq.graph._tvm import IRModule, Target


@dataclass(frozen=True)
class Library:
    """path: the file; metadata: what its `_metadata` returns; target: TVM's JSON of it; kernels:
    what the assembler says of each CUDA kernel in it.
    """

    path: Path
    metadata: dict[str, Any]
    target: str
    kernels: tuple[KernelReport, ...] = ()


def compile_model(
    config: ModelConfig,
    out_lib: Path,
    target: str | Target = "cpu",
    quantization: str | None = None,
    context_window_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
    *,
    weight_layout: str | None = None,
    tables: Tables = PLAIN,
    roundings: Roundings = EXACT,
    progress: Callable[[str], None] | None = None,
) -> Library:
    """Compile `config` for `target` and write the shared library `out_lib`, whole or not at all.

    quantization: a name to insist on; by default what the checkpoint is. Sizes are in tokens and
    sequences, with the defaults of `compile_settings`. weight_layout: of the quantized weights that
    the library will be given, by default the stock one; tables: how its head and embedding are
    stored; roundings: what it rounds beside the weights. Raises UserError for everything that can
    be known to fail before compiling. Weights are not needed.
    """
    settings = compile_settings(config, context_window_size, prefill_chunk_size, max_batch_size)
    kind = infer_quantization(config, quantization, weight_layout, tables)
    kind = replace(kind, roundings=roundings)
    resolved = resolve_target(target) if isinstance(target, str) else target
    check_roundings(roundings, kind.weight_layout, target_device(resolved))
    check_layout(kind.weight_layout, target_device(resolved))
    check_tables(tables, target_device(resolved))
    check_dtype(kind, target_device(resolved))
    tools = find_tools(resolved)

    from mlcawq.graph.pipeline import build_module, compile_module

    say = progress or (lambda stage: None)

    def graph(target: Target) -> tuple[IRModule, dict[str, Any]]:
        try:
            return build_module(config, kind, settings, target)
        except NotImplementedError as error:
            device = target_device(target)
            raise UserError.one(
                f"there are no kernels for this model on {device}: {error}",
                fix="build it for another target, or with another --weight-layout or "
                "--quantization",
            ) from error

    if target_device(resolved) == "cpu":
        from mlcawq.build.cpu_library import compile_for_cpu

        variants = _variants(target, resolved)
        metadata = compile_for_cpu(graph, settings, variants, tools, Path(out_lib), say)
        return Library(Path(out_lib), metadata, str(resolved))
    say("graph")
    module, metadata = graph(resolved)
    say("code")
    metadata["target"] = target_record(resolved)
    with tools.generating():
        executable = compile_module(module, settings, resolved, metadata)
    say("link")
    kernels = tools.link(executable, Path(out_lib))
    return Library(Path(out_lib), metadata, str(resolved), kernels)


def _variants(target: str | Target, resolved: Target) -> tuple[Variant, ...]:
    """Of a library for processors; one that is described in JSON, or made by code, has one."""
    if isinstance(target, str) and target.partition(":")[0] == "cpu":
        return cpu_variants(target)
    return (variant_of(resolved),)
