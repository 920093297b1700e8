"""What makes each parameter of an AWQ model, and what its tensors must look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from mlc_llm.loader import ExternMapping

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, raise_all
from tir_kernels.layouts import AUTOAWQ, PACK, LinearShape

PARTS = ("qweight", "qzeros", "scales")
SYMMETRIC_ZEROS = np.uint32(0x88888888)  # eight nibbles of 8: the middle of 0..15
_FLOATS = ("F16", "BF16", "F32")


@dataclass
class AwqMapping(ExternMapping):
    """mlc_llm's mapping, with what is needed to check a checkpoint before it is read.

    shapes: of every parameter that is not an array of a quantized linear; None for a size that
        the model leaves open.
    linears: the quantized linears, by MLC's name.
    symmetric: whether qzeros may be missing, which are then SYMMETRIC_ZEROS.
    """

    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    linears: dict[str, LinearShape] = field(default_factory=dict)
    symmetric: bool = False

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
        return elements + sum(shape.K * shape.N for shape in self.linears.values())

    def check(self, reader: TensorReader) -> None:
        """Raises one UserError naming every tensor that is missing, has another shape or type than
        the model needs, or belongs to no parameter.
        """
        where = str(reader.folder)
        sources = self.without_missing_zeros(reader)
        used = {source for names in sources.values() for source in names}
        problems = [
            Problem(f"tensor {name} is missing", where) for name in used if name not in reader
        ]
        problems += [
            Problem(f"{name} is not part of this architecture as config.json describes it", where)
            for name in reader.names
            if name not in used and not self._ignored(name)
        ]
        for name, names in sources.items():
            if all(source in reader for source in names):
                problems += self._misfits(name, names, reader)
        raise_all(sorted(problems, key=lambda problem: problem.what))

    def _ignored(self, name: str) -> bool:
        # Rotary frequencies follow from the config; a tied head may be stored a second time.
        return (
            name in self.unused_params
            or name.endswith("rotary_emb.inv_freq")
            or (name == "lm_head.weight" and name not in self.param_map)
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
        stock, _ = self.linears[linear].parameters(AUTOAWQ)[part]
        for info in infos:
            if len(info.shape) != 2 or info.shape[0] != stock[0]:
                yield Problem(
                    f"{info.name} has shape {list(info.shape)}, expected {stock[0]} rows", where
                )
        columns = sum(info.shape[-1] for info in infos if info.shape)
        if columns != stock[1]:
            unit = f"words of {PACK} columns" if part != "scales" else "columns"
            yield Problem(f"{name} needs {stock[1]} {unit}, found {columns}", where)
