"""What a library is compiled for, beside the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import find_family
from mlcawq.graph.rope import context_limit
from mlcawq.graph.roundings import EXACT, Roundings
from mlcawq.graph.tables import PLAIN, Tables
from tir_kernels.layouts import AUTOAWQ, BLOCKED, LAYOUTS, TILED

PAGE_SIZE = 16  # tokens in a page of the KV cache; the kernels are compiled for it
WORDS = "uint32"  # the type of packed weights in folders and libraries, mlc_llm's; kernels: int32
_SUFFIXES = {"": 128, "_g64": 64, "_g32": 32}  # of AWQ names, and the group size they stand for
_DTYPES = {"f16": "float16", "f32": "float32"}
_DENSE = {f"q0{short}": dtype for short, dtype in _DTYPES.items()}
_AWQ = {
    f"q4{short}_autoawq{suffix}": (dtype, size)
    for short, dtype in _DTYPES.items()
    for suffix, size in _SUFFIXES.items()
}
QUANTIZATIONS = (*_DENSE, *_AWQ)
MLC_LAYOUTS = (AUTOAWQ, TILED)  # that mlc_llm's graphs can have
TARGET_KINDS = ("cpu", "cuda", "vulkan")


@dataclass(frozen=True)
class Quantization:
    """name: MLC's. group_size: None where weights are not quantized. dtype: of activations,
    unquantized parameters, scales and the KV cache. weight_layout: of the quantized weights that
    kernels of this library expect (`tir_kernels.layouts`), None where there are none. tables: how
    the output head and the embedding are stored. roundings: beside those of the weights.
    """

    name: str
    dtype: str
    group_size: int | None
    weight_layout: str | None = None
    tables: Tables = PLAIN
    roundings: Roundings = EXACT

    def names(self) -> dict[str, str]:
        """What files and libraries say of what is rounded beside the AWQ weights."""
        return self.tables.names() | self.roundings.names()


def awq_names(group_size: int) -> tuple[str, ...]:
    """The names that AWQ weights with groups of `group_size` can have."""
    return tuple(name for name, (_, size) in _AWQ.items() if size == group_size)


def default_layout(target_kind: str, dtype: str = "float16") -> str:
    """The layout of quantized weights that a target's kernels are fastest with.

    dtype: of activations. The CPU's kernels for its own layout round them to 16 bits, which is
    less than float32 is asked for.
    """
    if target_kind == "cpu":
        return BLOCKED if dtype == "float16" else AUTOAWQ
    return TILED


def check_layout(layout: str | None, target_kind: str | None = None) -> None:
    """Raises UserError for a layout that is not known, or that a target has no kernels for."""
    if layout is not None and layout not in LAYOUTS:
        raise UserError.one(
            f"weight layout {layout!r} is not known", fix=f"use one of {', '.join(LAYOUTS)}"
        )
    if (layout == TILED and target_kind == "cpu") or (
        layout == BLOCKED and target_kind not in (None, "cpu")
    ):
        others = "GPUs" if layout == TILED else "CPUs"
        raise UserError.one(
            f"there are no kernels for {target_kind} and weights in the layout {layout}, which is "
            f"for {others}",
            fix=f"convert the weights with --weight-layout {AUTOAWQ} (every target runs it), or "
            f"build a folder of its own with --target {target_kind}",
        )


def check_mlc_layout(layout: str | None) -> None:
    """Raises UserError for a layout that our kernels in mlc_llm's compiler do not read."""
    if layout is not None and layout not in MLC_LAYOUTS:
        raise UserError.one(
            f"weights in the layout {layout} are for libraries that mlcawq compiles itself",
            "weight_layout",
            f"use --weight-layout {AUTOAWQ}, or build without --via mlc-llm",
        )


def check_dtype(quantization: Quantization, target_kind: str) -> None:
    """Raises UserError for a type of activations that a target has no kernels for."""
    if target_kind == "cuda" and quantization.dtype == "float32":
        raise UserError.one(
            f"{quantization.name} computes in float32, which the CUDA kernels do not",
            fix=f"build with --quantization {quantization.name.replace('f32', 'f16')}",
        )


def quantization_named(
    name: str, weight_layout: str | None = None, tables: Tables = PLAIN
) -> Quantization:
    """weight_layout: of AWQ names, by default the stock one. Raises UserError that lists the known
    names.
    """
    if name in _DENSE:
        return Quantization(name, _DENSE[name], None, None, tables)
    if name not in _AWQ:
        raise UserError.one(
            f"quantization {name!r} is not known", fix=f"use one of {', '.join(QUANTIZATIONS)}"
        )
    check_layout(weight_layout)
    return Quantization(name, *_AWQ[name], weight_layout or AUTOAWQ, tables)


def infer_quantization(
    config: ModelConfig,
    requested: str | None = None,
    weight_layout: str | None = None,
    tables: Tables = PLAIN,
) -> Quantization:
    """The quantization that a checkpoint's weights already have; `requested` must agree with it.

    An AWQ checkpoint is q4f16_autoawq with the suffix of its group size, or q4f32_autoawq when
    that is requested; an unquantized one is q0f16, or q0f32 when its tensors are fp32 or that is
    requested. weight_layout: as for `quantization_named`.
    """
    awq = config.quantization
    if awq is None:
        found = "q0f32" if config.dtype == "float32" else "q0f16"
        possible = tuple(_DENSE)
    else:
        possible = awq_names(awq.group_size)
        found = possible[0]
    if requested is None or requested == found:
        return quantization_named(found, weight_layout, tables)
    wanted = quantization_named(requested, weight_layout, tables)
    if requested not in possible:
        kind = f"AWQ with group size {awq.group_size}" if awq else "not quantized"
        raise UserError.one(
            f"quantization {requested} was asked for, but the checkpoint is {kind}",
            fix=f"leave --quantization out, or use {' or '.join(possible)}"
            + ("" if awq else "; `mlcawq quantize` makes an AWQ checkpoint of it"),
        )
    return wanted


@dataclass(frozen=True)
class CompileSettings:
    """Sizes in tokens; max_batch_size in sequences. They bound the memory that is planned."""

    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int


def compile_settings(
    config: ModelConfig,
    context_window_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
) -> CompileSettings:
    """Defaults filled in, and everything that does not fit the model refused in one UserError.

    context_window_size is by default what the model was made for, at most what one library can
    serve exactly (`rope.context_limit`); prefill_chunk_size by default that, at most 2048.
    """
    problems: list[Problem] = []
    limit, reason = context_limit(config)
    longest = min(config.max_position_embeddings, limit or config.max_position_embeddings)
    given = {
        "context_window_size": context_window_size,
        "prefill_chunk_size": prefill_chunk_size,
        "max_batch_size": max_batch_size,
    }
    for name, value in given.items():
        if value is not None and value <= 0:
            problems.append(Problem(f"{name} must be positive, found {value}"))
    context = context_window_size or longest
    if limit is not None and context > limit:
        problems.append(
            Problem(
                f"context_window_size {context} is more than the {limit} tokens that this model "
                f"can be compiled for: {reason}",
                fix=f"use --context-window-size {limit} or less",
            )
        )
    raise_all(problems)
    chunk = min(prefill_chunk_size or 2048, context)
    return CompileSettings(context, chunk, max_batch_size or 4)


def quantized_linears(config: ModelConfig) -> frozenset[str]:
    """Full names of the fused linears whose weights are int4, honouring modules_to_not_convert.

    Raises UserError when the parts of one fused linear differ: they could not be concatenated.
    """
    if config.quantization is None:
        return frozenset()
    family = find_family(config)
    skipped = config.quantization.modules_to_not_convert
    quantized: set[str] = set()
    problems: list[Problem] = []
    for i in range(config.num_hidden_layers):
        block = family.block.format(i)
        parts_of: dict[str, list[str]] = {}
        for linear in family.linears:
            parts_of.setdefault(family.fused_name(linear), []).append(f"{block}.{linear}")
        for fused, parts in parts_of.items():
            # transformers and AutoAWQ match these names as substrings.
            kept = [part for part in parts if any(name in part for name in skipped)]
            if kept and len(kept) < len(parts):
                problems.append(
                    Problem(
                        f"{', '.join(kept)} is left unquantized and the rest of {fused} is not; "
                        "they are computed as one linear",
                        "modules_to_not_convert",
                        "quantize all of them, or none",
                    )
                )
            elif not kept:
                quantized.add(f"{block}.{fused}")
    raise_all(problems)
    return frozenset(quantized)
