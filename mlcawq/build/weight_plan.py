"""Which tensors of a checkpoint make which parameter of a library, decided from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import expected_tensors, find_family, linear_biases, linear_shapes
from mlcawq.graph.settings import WORDS, Quantization, quantized_linears
from mlcawq.graph.tables import Table
from tir_kernels.layouts import AUTOAWQ, BLOCKED, SYMMETRIC_ZEROS, TILED, LinearShape
from tir_kernels.pack_blocks import block_qweight, block_qzeros, block_scales
from tir_kernels.pack_tiles import tile_qweight, tile_qzeros, tile_scales

_TILE = {"qweight": tile_qweight, "qzeros": tile_qzeros, "scales": tile_scales}
_BLOCK = {"qweight": block_qweight, "qzeros": block_qzeros, "scales": block_scales}
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Relayout:
    """From the stock layout to `layout`. kind: which array of a quantized linear ("qweight",
    "qzeros", "scales"); stock_shape: what it has before.

    silu: gate and up are interleaved, as kernels of the tiled layout want them that compute
    silu(gate) * up at once.
    """

    layout: str
    kind: str
    stock_shape: tuple[int, ...]
    silu: bool = False

    def __call__(self, stock: np.ndarray) -> np.ndarray:
        if self.layout == BLOCKED:
            return _BLOCK[self.kind](stock)
        return _TILE[self.kind](stock, self.silu)


@dataclass(frozen=True)
class Rounding:
    """The parameter is the array `kind` of a table that is rounded (`rounded_table`)."""

    table: Table
    kind: str
    scale_dtype: str


@dataclass(frozen=True)
class Parameter:
    """One parameter of the library: `sources` of the checkpoint, concatenated along `axis`.

    dtype, shape: of the result. constant: the value of every element when `sources` is empty.
    relayout: how the concatenated array is brought into another layout, None if it is not.
    rounding: what part of the only source, rounded, it is; None for a parameter that is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    axis: int = 0
    constant: int | None = None
    relayout: Relayout | None = None
    rounding: Rounding | None = None

    @property
    def stored_dtype(self) -> str:
        """The type under which the parameter is stored; the bytes are those of `dtype`."""
        return WORDS if self.dtype == "int32" else self.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (2 if self.dtype == "float16" else 4)


def plan_parameters(
    config: ModelConfig, quantization: Quantization, reader: TensorReader
) -> list[Parameter]:
    """Every parameter in the order of the model, with all tensors checked.

    Raises one UserError that names every tensor that is missing, has another shape or type than
    the config says, or is not part of this architecture.
    """
    family = find_family(config)
    own_head = has_own_head(config, reader)
    if own_head and (quantization.tables.head is None or quantization.tables.head.bits != 4):
        raise UserError.one(
            "the output head is quantized, and what is built would compute with another one",
            f"{reader.folder}: {family.head}",
            "build with --target cpu and without --head, or quantize the model again, without "
            "--quantize-head",
        )
    quantized = quantized_linears(config)
    shapes, biases = linear_shapes(config), linear_biases(config)
    fused: dict[str, list[str]] = {}
    for linear in family.linears:
        fused.setdefault(family.fused_name(linear), []).append(linear)

    plan: list[Parameter] = []
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}

    def dense(name: str, parts: list[str], shapes_of_parts: list[tuple[int, ...]]) -> None:
        for part, shape in zip(parts, shapes_of_parts, strict=True):
            wanted[part] = (shape, _FLOATS)
        rows = sum(shape[0] for shape in shapes_of_parts)
        shape = (rows, *shapes_of_parts[0][1:])
        plan.append(Parameter(name, quantization.dtype, shape, tuple(parts)))

    def table(name: str, spec: Table | None) -> None:
        source = f"{name}.weight"
        if spec is None:
            dense(source, [source], [expected[source]])
            return
        wanted[source] = (expected[source], _FLOATS)
        scales = quantization.dtype
        rows, width = expected[source]
        for kind, (shape, dtype) in spec.parameters(rows, width, scales).items():
            rounding = Rounding(spec, kind, scales)
            plan.append(Parameter(f"{name}.{kind}", dtype, shape, (source,), rounding=rounding))

    def awq(name: str, parts: list[str], sizes: list[tuple[int, int]], layout: str) -> None:
        assert quantization.group_size is not None
        shape = LinearShape(sizes[0][0], sum(out for _, out in sizes), quantization.group_size)
        arrays = shape.parameters(layout)
        symmetric = config.quantization is not None and not config.quantization.zero_point
        silu = layout == TILED and name.endswith(family.gate_up)
        for kind, (stock, dtype) in shape.parameters(AUTOAWQ).items():
            sources = tuple(f"{part}.{kind}" for part in parts)
            constant = None
            if kind == "qzeros" and symmetric and not any(s in reader for s in sources):
                sources, constant = (), SYMMETRIC_ZEROS
            for source, (_, out) in zip(sources, sizes, strict=False):
                kinds = ("I32",) if dtype == "int32" else _FLOATS
                wanted[source] = ((stock[0], out * stock[1] // shape.N), kinds)
            plan.append(
                Parameter(
                    f"{name}.{kind}",
                    quantization.dtype if kind == "scales" else dtype,
                    arrays[kind][0],
                    sources,
                    1,
                    constant,
                    None if layout == AUTOAWQ else Relayout(layout, kind, stock, silu),
                )
            )

    expected = expected_tensors(config)
    table(family.embedding, quantization.tables.embedding)
    for i in range(config.num_hidden_layers):
        block = family.block.format(i)
        for norm in family.norms[:1]:
            dense(f"{block}.{norm}.weight", [f"{block}.{norm}.weight"], [(config.hidden_size,)])
        for name, parts in fused.items():
            full = [f"{block}.{part}" for part in parts]
            sizes = [shapes[part] for part in parts]
            if f"{block}.{name}" in quantized:
                awq(f"{block}.{name}", full, sizes, quantization.weight_layout or AUTOAWQ)
            else:
                dense(
                    f"{block}.{name}.weight",
                    [f"{part}.weight" for part in full],
                    [(out, K) for K, out in sizes],
                )
            if biases[parts[0]]:
                dense(
                    f"{block}.{name}.bias",
                    [f"{part}.bias" for part in full],
                    [(out,) for _, out in sizes],
                )
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                name = f"{block}.self_attn.{norm}.weight"
                dense(name, [name], [(config.head_dim,)])
        for norm in family.norms[1:]:
            dense(f"{block}.{norm}.weight", [f"{block}.{norm}.weight"], [(config.hidden_size,)])
    final = f"{family.final_norm}.weight"
    dense(final, [final], [(config.hidden_size,)])
    head = family.head
    if own_head:
        awq(head, [head], [(config.hidden_size, config.vocab_size)], BLOCKED)
    elif not config.tie_word_embeddings:
        table(head, quantization.tables.head)
    _check(reader, wanted, ignored={f"{head}.weight"} if config.tie_word_embeddings else set())
    return plan


def has_own_head(config: ModelConfig, reader: TensorReader) -> bool:
    """Whether the checkpoint's output head is quantized already."""
    return f"{find_family(config).head}.qweight" in reader


def _check(
    reader: TensorReader,
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]],
    ignored: set[str],
) -> None:
    where = str(reader.folder)
    problems: list[Problem] = []
    for name, (shape, dtypes) in wanted.items():
        if name not in reader:
            problems.append(Problem(f"tensor {name} is missing", where))
            continue
        info = reader.info(name)
        if info.shape != shape:
            problems.append(
                Problem(f"{name} has shape {list(info.shape)}, expected {list(shape)}", where)
            )
        if info.dtype not in dtypes:
            problems.append(
                Problem(f"{name} has type {info.dtype}, expected {' or '.join(dtypes)}", where)
            )
    for name in reader.names:
        # Old checkpoints stored the rotary frequencies, which follow from the config.
        if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            problems.append(
                Problem(
                    f"{name} is not part of this architecture as config.json describes it", where
                )
            )
    raise_all(problems)
