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
from tir_kernels.layouts import AUTOAWQ, SYMMETRIC_ZEROS, TILED, LinearShape
from tir_kernels.pack_tiles import tile_qweight, tile_qzeros, tile_scales

_TILE = {"qweight": tile_qweight, "qzeros": tile_qzeros, "scales": tile_scales}
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Tiling:
    """kind: which array of a quantized linear ("qweight", "qzeros", "scales"); stock_shape: what
    it has before.

    silu: gate and up are interleaved, as kernels want them that compute silu(gate) * up at once.
    """

    kind: str
    stock_shape: tuple[int, ...]
    silu: bool

    def __call__(self, stock: np.ndarray) -> np.ndarray:
        """From the stock layout to the tiled one."""
        return _TILE[self.kind](stock, self.silu)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the library: `sources` of the checkpoint, concatenated along `axis`.

    dtype, shape: of the result. constant: the value of every element when `sources` is empty.
    tiling: how the concatenated array is brought into the tiled layout, None if it is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    axis: int = 0
    constant: int | None = None
    tiling: Tiling | None = None

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
    if f"{family.head}.qweight" in reader:
        raise UserError.one(
            "the output head is quantized, and compiled models compute with a plain one",
            f"{reader.folder}: {family.head}",
            "quantize the model again, without --quantize-head",
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

    def awq(name: str, parts: list[str], sizes: list[tuple[int, int]]) -> None:
        assert quantization.group_size is not None
        shape = LinearShape(sizes[0][0], sum(out for _, out in sizes), quantization.group_size)
        tiled = shape.parameters(TILED) if quantization.weight_layout == TILED else None
        symmetric = config.quantization is not None and not config.quantization.zero_point
        silu = name.endswith(family.gate_up)
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
                    stock if tiled is None else tiled[kind][0],
                    sources,
                    1,
                    constant,
                    None if tiled is None else Tiling(kind, stock, silu),
                )
            )

    expected = expected_tensors(config)
    embedding = f"{family.embedding}.weight"
    dense(embedding, [embedding], [expected[embedding]])
    for i in range(config.num_hidden_layers):
        block = family.block.format(i)
        for norm in family.norms[:1]:
            dense(f"{block}.{norm}.weight", [f"{block}.{norm}.weight"], [(config.hidden_size,)])
        for name, parts in fused.items():
            full = [f"{block}.{part}" for part in parts]
            sizes = [shapes[part] for part in parts]
            if f"{block}.{name}" in quantized:
                awq(f"{block}.{name}", full, sizes)
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
    head = f"{family.head}.weight"
    if not config.tie_word_embeddings:
        dense(head, [head], [expected[head]])
    _check(reader, wanted, ignored={head} if config.tie_word_embeddings else set())
    return plan


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
