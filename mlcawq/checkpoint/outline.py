"""What is known of a checkpoint before a tensor is read: its config, names and shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import nn

from mlcawq.checkpoint.decoder_config import DecoderConfig, read_decoder_config
from mlcawq.checkpoint.experts import unfused
from mlcawq.checkpoint.names import TensorMap
from mlcawq.checkpoint.skeleton import make_skeleton
from mlcawq.checkpoint.stored import StoredTensors
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, UserError
from mlcawq.families import ARCHITECTURES, Architecture

Shape = tuple[int, int]  # (in_features, out_features)


class Outline:
    """A checkpoint folder of any decoder of transformers, as far as its headers tell.

    reader: where tensors are; the folder's own files when None.
    attention: transformers' attention implementation, "sdpa" or "eager".

    config, skeleton, names, reader, stored: what it is made of; the last two only where there
        are no `problems`.
    table: the architecture's scaling groups; None where there is no table, until its blocks have
        been traced (`StreamedModel.architecture`).
    Raises UserError for a config that cannot be read.
    """

    def __init__(
        self, folder: Path, reader: TensorReader | None = None, attention: str = "sdpa"
    ) -> None:
        self.config: DecoderConfig = read_decoder_config(folder)
        self._unreadable: tuple[Problem, ...] = ()
        try:
            self.reader = reader or TensorReader(folder)
            self.stored = StoredTensors(self.reader, self.config.quantization)
        except UserError as error:
            # Shapes and names are known all the same, and what else is wrong with them.
            self._unreadable = error.problems
        self.skeleton = make_skeleton(self.config, attention)
        self.names = TensorMap(self.skeleton, () if self._unreadable else self.stored.names)
        self.blocks = self.skeleton.blocks
        self.num_blocks = len(self.blocks)
        self.table: Architecture | None = ARCHITECTURES.get(self.config.model_type)
        self._shapes: dict[int, dict[str, Shape]] = {}
        self._listed: dict[int, list[str]] = {}

    @property
    def readable(self) -> bool:
        """Whether `reader` and `stored` are there."""
        return not self._unreadable

    def problems(self) -> Iterator[Problem]:
        """Every shard that cannot be read, else every tensor of a quantized linear that is not as
        its config means it, else every one that is missing, unexpected or of the wrong shape."""
        if self._unreadable:
            yield from self._unreadable
            return
        for name, shape, source in self.names.expected():
            if source is None:
                where = self.names.stored_name(name)
                yield Problem("tensor is missing", where, "download the checkpoint again")
            elif source:
                yield from self.stored.shape_problems(source, shape)
        for name, sources in self.names.unmade(self._stored_shape):
            yield Problem(
                f"{', '.join(sources)} do not make the tensor that config.json means",
                self.names.stored_name(name),
                "download the checkpoint again",
            )
        for name in self.names.unexpected:
            if not self.names.stale(name):
                for part in self.stored.parts(name):
                    yield Problem("unexpected tensor: config.json does not account for it", part)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        spec = self.stored.linears.get(name.removesuffix(".weight"))
        if spec is not None:
            return spec.out_features, spec.in_features
        return tuple(self.reader.info(name).shape)

    def path(self, i: int) -> str:
        """The path of block i in transformers' model."""
        return f"{self.skeleton.layers}.{i}"

    def block_name(self, i: int) -> str:
        """Name of decoder block i in the checkpoint ("model.layers.3")."""
        return self.names.stored_name(self.path(i))

    def checkpoint_name(self, i: int, name: str) -> str:
        """The checkpoint's full name of a tensor or linear of block i, by its name in the block.

        Also of a tensor that is not there yet ("self_attn.q_proj.qweight").
        """
        return self.names.stored_name(f"{self.path(i)}.{name}")

    def block_tensors(self, i: int) -> list[str]:
        """The stored tensors that block i owns, sorted: every part of a quantized linear."""
        own = self.names.within(self.path(i))
        prefix = f"{self.block_name(i)}."
        unused = [name for name in self.names.unexpected if name.startswith(prefix)]
        return sorted(part for name in {*own, *unused} for part in self.stored.parts(name))

    def bare_block(self, i: int) -> nn.Module:
        """Block i with its parameters on the meta device, experts apart."""
        return unfused(copy.deepcopy(self.blocks[i]), self.names.expert_names)

    def like(self, i: int) -> int:
        """The first block that has the same modules as block i, in the same shapes."""
        return self._firsts[i]

    @cached_property
    def _firsts(self) -> list[int]:
        seen: dict[object, int] = {}
        return [seen.setdefault(_kind(block), i) for i, block in enumerate(self.blocks)]

    def linear_shapes(self, i: int) -> dict[str, Shape]:
        """Every linear of block i, by its name in the block."""
        first = self.like(i)
        if first not in self._shapes:
            self._shapes[first] = {
                name: (module.in_features, module.out_features)
                for name, module in self.bare_block(first).named_modules()
                if isinstance(module, nn.Linear)
            }
        return self._shapes[first]

    def quantizable(self, i: int) -> dict[str, Shape]:
        """The linears of block i that are quantized, by their names in it.

        Those that its architecture's table lists; all of them where there is no table.
        """
        shapes, table = self.linear_shapes(i), self.table
        if table is None:
            return shapes
        first = self.like(i)
        if first not in self._listed:
            groups = table.groups_of(self.bare_block(first))
            self._listed[first] = [name for group in groups for name in group.linears]
        return {name: shapes[name] for name in self._listed[first]}

    def merged(self, i: int) -> dict[str, list[str]]:
        """The quantizable linears of block i whose weight is no tensor of its own in the
        checkpoint -> the tensors that hold it with others: experts in one, a fused projection."""
        found = {name: f"{self.path(i)}.{name}.weight" for name in self.quantizable(i)}
        return {
            name: self.names.holders(weight)
            for name, weight in found.items()
            if self.names.source_of(weight) is None and self.names.holders(weight)
        }

    def all_quantizable(self) -> dict[str, Shape]:
        """`quantizable` of every block, by the checkpoint's full names."""
        return {
            self.checkpoint_name(i, name): shape
            for i in range(self.num_blocks)
            for name, shape in self.quantizable(i).items()
        }


def _kind(block: nn.Module) -> object:
    """What blocks have in common whose linears are the same."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tensor.shape) for name, tensor in block.state_dict().items())
