"""What makes each parameter of an AWQ model, and what its tensors must look like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, raise_all
from tir_kernels.layouts import AUTOAWQ, PACK, LinearShape

PARTS = ("qweight", "qzeros", "scales")
HEAD = "lm_head.weight"
_FLOATS = ("F16", "BF16", "F32")


@dataclass
class AwqMapping:
    """As mlc_llm's ExternMapping, with what is needed to check a checkpoint before it is read.

    param_map: the names of the tensors that make each parameter.
    map_func: the function of these tensors that makes it.
    unused_params: names of tensors that may be there and are not needed.
    shapes: of every parameter that is not an array of a quantized linear; None for a size that
        the model leaves open.
    linears: the quantized linears, by MLC's name.
    symmetric: whether qzeros may be missing, which are then `tir_kernels.layouts.SYMMETRIC_ZEROS`.
    """

    param_map: dict[str, list[str]] = field(default_factory=dict)
    map_func: dict[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    unused_params: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    linears: dict[str, LinearShape] = field(default_factory=dict)
    symmetric: bool = False

    def add_mapping(
        self, parameter: str, tensors: list[str], function: Callable[..., np.ndarray]
    ) -> None:
        self.param_map[parameter] = tensors
        self.map_func[parameter] = function

    def without_missing_zeros(self, reader: TensorReader) -> dict[str, list[str]]:
        """param_map, with no sources for the qzeros that a symmetric checkpoint leaves out."""
        return {
            name: []
            if self.symmetric
            and name.endswith(".qzeros")
            and not any(source in reader for source in sources)
            else sources
            for name, sources in self.param_map.items()
        }

    def float_parameters(self, reader: TensorReader) -> int:
        """The number of elements of the unquantized model."""
        dense = (self.param_map[name] for name in self.shapes)
        elements = sum(prod(reader.info(source).shape) for names in dense for source in names)
        words = (shape.parameters(AUTOAWQ)["qweight"][0] for shape in self.linears.values())
        return elements + PACK * sum(map(prod, words))

    def check(self, reader: TensorReader) -> None:
        """Raises one UserError naming every tensor that is missing, has another shape or type than
        the model needs, or belongs to no parameter of a module that the model has.
        """
        where = str(reader.folder)
        sources = self.without_missing_zeros(reader)
        used = self._used(reader)
        modules = {_module(name) for name in used}
        problems = [
            Problem(f"tensor {name} is missing", where) for name in used if name not in reader
        ]
        problems += [
            Problem(f"{name} is not part of this architecture as config.json describes it", where)
            for name in reader.names
            if name not in used
            and (_module(name) in modules or name == HEAD)
            and not self._ignored(name, used, reader)
        ]
        for name, names in sources.items():
            if names and all(source in reader for source in names):
                problems += self._misfits(name, names, reader)
        raise_all(sorted(problems, key=lambda problem: problem.what))

    def left_out(self, reader: TensorReader) -> list[str]:
        """Modules of the checkpoint that the model does not have: its eyes and ears, say."""
        used = self._used(reader)
        modules = {_module(name) for name in used}
        others = {_module(name) for name in reader.names if not self._ignored(name, used, reader)}
        return sorted(others - modules - {_module(HEAD)})

    def _used(self, reader: TensorReader) -> set[str]:
        return {name for names in self.without_missing_zeros(reader).values() for name in names}

    def _ignored(self, name: str, used: set[str], reader: TensorReader) -> bool:
        # Rotary frequencies follow from the config.
        if name in self.unused_params or name.endswith("rotary_emb.inv_freq"):
            return True
        return name == HEAD and any(
            "embed" in other and _same(name, other, reader) for other in used if other in reader
        )

    def _misfits(
        self, name: str, sources: Sequence[str], reader: TensorReader
    ) -> Iterator[Problem]:
        where = str(reader.folder)
        linear, _, part = name.rpartition(".")
        infos = [reader.info(source) for source in sources]
        kinds = ("I32",) if part in ("qweight", "qzeros") and linear in self.linears else _FLOATS
        for info in infos:
            if info.dtype not in kinds:
                yield Problem(
                    f"{info.name} has type {info.dtype}, expected {' or '.join(kinds)}", where
                )
        if linear not in self.linears or part not in PARTS:
            sizes = [size for size in self.shapes[name] if size is not None]
            complete = len(sizes) == len(self.shapes[name])
            if complete and sum(prod(info.shape) for info in infos) != prod(sizes):
                found = " + ".join(str(list(info.shape)) for info in infos)
                yield Problem(f"{name} needs shape {sizes}, found {found}", where)
            return
        (*experts, rows, columns), _ = self.linears[linear].parameters(AUTOAWQ)[part]
        for info in infos:
            if len(info.shape) != 2 or info.shape[0] != rows:
                yield Problem(
                    f"{info.name} has shape {list(info.shape)}, expected {rows} rows", where
                )
        wanted = prod(experts) * columns
        given = sum(info.shape[-1] for info in infos if info.shape)
        if given != wanted:
            unit = f"words of {PACK} columns" if part != "scales" else "columns"
            yield Problem(f"{name} needs {wanted} {unit}, found {given}", where)


def _module(tensor: str) -> str:
    """The module that a tensor belongs to: up to the number of a block, where it is in one."""
    parts = tensor.split(".")[:-1]
    return ".".join(itertools.takewhile(lambda part: not part.isdigit(), parts))


def _same(name: str, other: str, reader: TensorReader) -> bool:
    """Whether two tensors are one, stored twice, as tied embeddings are by some programs."""
    a, b = reader.info(name), reader.info(other)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and (
        reader.numpy(name).tobytes() == reader.numpy(other).tobytes()
    )
