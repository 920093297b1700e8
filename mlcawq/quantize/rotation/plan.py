"""What has to change in which tensor for the residual stream to be rotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mlcawq.checkpoint.outline import Outline
from mlcawq.errors import Problem, raise_all
from mlcawq.families import Architecture, ScalingGroup
from mlcawq.families.base import linear_names
from mlcawq.families.rows import rows_of, value_head_dim
from mlcawq.quantize.probes import mixes_tokens
from mlcawq.quantize.recipe import RotationRecipe
from mlcawq.quantize.rotation.hadamard import Rotation, random_hadamard
from mlcawq.quantize.rotation.reader import Change, HeadRotation, Plan

ADVICE = "use a recipe without rotation: --recipe awq+gptq"


def plan_rotation(
    outline: Outline, table: Architecture, recipe: RotationRecipe
) -> tuple[Plan, Rotation]:
    """The changes, and the rotation of the residual stream. Reads no weights.

    Raises UserError where `rotation_problems` are.
    """
    raise_all(rotation_problems(outline, table))
    planner = _Planner(outline, table, recipe)
    planner.outside()
    for i in range(outline.num_blocks):
        planner.block(i)
    return planner.plan, planner.stream


def rotation_problems(outline: Outline, table: Architecture) -> list[Problem]:
    """Everything in an architecture that does not allow its residual stream to be rotated."""
    problems = list(_outside_problems(outline, table))
    for i in range(outline.num_blocks):
        problems.extend(_block_problems(outline, table, i))
    # What is wrong with one block is mostly wrong with all: said of the first.
    return list({problem.what: problem for problem in reversed(problems)}.values())


def _outside_problems(outline: Outline, table: Architecture) -> Iterator[Problem]:
    if outline.config.whole is not outline.config.hf:
        yield Problem(
            "rotation would have to turn what a vision tower adds to the residual stream",
            outline.config.model_type,
            ADVICE,
        )
    path = table.final_norm
    yield from _norm_problems(
        outline.skeleton.model.get_submodule(path), outline.names.stored_name(path)
    )


def _block_problems(outline: Outline, table: Architecture, i: int) -> Iterator[Problem]:
    block = outline.bare_block(i)
    groups = table.groups_of(block)
    norms = _stream_norms(block, groups, outline.config.hidden_size)
    if groups[0].previous is None:
        yield Problem(
            "rotation needs a norm with weights before the linears that read the residual stream",
            outline.checkpoint_name(i, groups[0].linears[0]),
            ADVICE,
        )
    for name in norms:
        yield from _norm_problems(block.get_submodule(name), outline.checkpoint_name(i, name))
    for name, module in block.named_children():
        if name not in norms and _has_weights(module, outline.config.hidden_size):
            yield Problem(
                "rotation cannot pass a norm of what is added to the residual stream",
                outline.checkpoint_name(i, name),
                ADVICE,
            )
    for name in linear_names(block):
        stored = outline.checkpoint_name(i, f"{name}.weight")
        if stored not in outline.reader:
            yield Problem(
                "rotation needs each linear as a tensor of its own, and here several are one",
                stored,
                ADVICE,
            )


def _norm_problems(norm: nn.Module, where: str) -> Iterator[Problem]:
    if _rms_offset(norm) is None:
        yield Problem(
            "rotation needs RMS norms, whose outputs turn with their inputs, and "
            f"{type(norm).__name__} is none",
            where,
            ADVICE,
        )


class _Planner:
    """Fills in `plan`, for an architecture that allows it."""

    def __init__(self, outline: Outline, table: Architecture, recipe: RotationRecipe) -> None:
        self._outline, self._table, self._recipe = outline, table, recipe
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._heads: dict[int, Rotation] = {}
        self.stream = random_hadamard(outline.config.hidden_size, self._generator)
        self.plan = Plan()

    def outside(self) -> None:
        """Embedding, final norm and head."""
        outline, skeleton = self._outline, self._outline.skeleton
        embedding, head = (
            f"{outline.names.stored_name(path)}.weight"
            for path in (skeleton.embedding, skeleton.head)
        )
        path = self._table.final_norm
        norm = self._absorbed(skeleton.model.get_submodule(path), outline.names.stored_name(path))
        self.plan.changes[embedding] = Change(reads=self.stream)
        self.plan.changes[head] = Change(norm, reads=self.stream)
        if head not in outline.reader:
            self.plan.copies[head] = embedding

    def block(self, i: int) -> None:
        """Decoder block i."""
        block = self._outline.bare_block(i)
        groups = self._table.groups_of(block)
        norms = _stream_norms(block, groups, self.stream.size)
        changes = {name: Change() for name in linear_names(block)}
        reading: set[str] = set()
        for group in groups:
            if group.previous in norms:
                stored = self._outline.checkpoint_name(i, group.previous)
                norm = self._absorbed(block.get_submodule(group.previous), stored)
                reading.update(group.linears, group.also)
                for name in (*group.linears, *group.also):
                    changes[name] = Change(norm, reads=self.stream)
        for name in _writers(block, groups, reading, self.stream.size):
            changes[name] = replace(changes[name], writes=self.stream)
        if self._recipe.heads:
            for group in groups:
                self._rotate_heads(block, group, changes)
        for name, change in changes.items():
            if change != Change():
                self._note(i, name, change)

    def _absorbed(self, norm: nn.Module, stored: str) -> tuple[str, float]:
        """Leave nothing of a norm's weights; the norm as a Change has it."""
        offset = _rms_offset(norm)
        assert offset is not None
        self.plan.neutral[f"{stored}.weight"] = 1.0 - offset
        return f"{stored}.weight", offset

    def _rotate_heads(
        self, block: nn.Module, group: ScalingGroup, changes: dict[str, Change]
    ) -> None:
        """Between the values and what reads them, if `group` is that."""
        (reader, *others) = group.linears
        attention = block.get_submodule(reader.rpartition(".")[0])
        if group.previous is None or others or not mixes_tokens(attention):
            return
        before, linear = (block.get_submodule(name) for name in (group.previous, reader))
        if not isinstance(before, nn.Linear) or not isinstance(linear, nn.Linear):
            return
        size = value_head_dim(self._outline.config.hf)
        if size not in self._heads:
            self._heads[size] = random_hadamard(size, self._generator)
        turned = self._heads[size]
        if isinstance(group.rows, str):
            rows = rows_of(group.rows, linear.in_features, before.out_features, size)
        else:
            rows = torch.tensor(group.rows)
        heads = torch.arange(linear.in_features).view(-1, size)
        sources = rows.view(-1, size).unique(dim=0)
        changes[reader] = replace(changes[reader], reads=HeadRotation(heads, turned))
        values = changes[group.previous]
        changes[group.previous] = replace(values, writes=HeadRotation(sources, turned))

    def _note(self, i: int, name: str, change: Change) -> None:
        """Put the change of a linear or a router of block i into the plan."""
        weight, bias = (
            self._outline.checkpoint_name(i, f"{name}.{kind}") for kind in ("weight", "bias")
        )
        self.plan.changes[weight] = change
        if change.writes is not None and bias in self._outline.reader:
            self.plan.changes[bias] = Change(writes=change.writes)


def _stream_norms(block: nn.Module, groups: Sequence[ScalingGroup], size: int) -> set[str]:
    """The norms that read the residual stream, of `size` channels, by their names in the block."""
    return {
        group.previous
        for group in groups
        if group.previous is not None and _has_weights(block.get_submodule(group.previous), size)
    }


def _has_weights(module: nn.Module, size: int) -> bool:
    """Whether it has a weight for each of `size` channels, as norms do."""
    return getattr(getattr(module, "weight", None), "shape", None) == (size,)


def _writers(
    block: nn.Module, groups: Sequence[ScalingGroup], reading: set[str], size: int
) -> Iterator[str]:
    """The linears whose output is added to the residual stream: the ends of both branches.

    They are as wide, do not read it, and no table has them as what comes before others.
    """
    before = {group.previous for group in groups}
    for name in linear_names(block):
        linear: Any = block.get_submodule(name)
        if linear.out_features == size and name not in reading and name not in before:
            yield name


def _rms_offset(norm: nn.Module) -> float | None:
    """What an RMS norm adds to its weight before it multiplies by it; None for another norm.

    Found by calling it, as there are as many classes of norms as architectures.
    """
    weight: Any = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None:
        return None
    inputs = torch.linspace(-1, 2, weight.numel()).unsqueeze(0)
    expected = inputs * inputs.square().mean().rsqrt()
    for offset in (0.0, 1.0):
        state = {"weight": torch.full(weight.shape, 1.0 - offset)}
        if torch.allclose(functional_call(norm, state, (inputs,)), expected, rtol=1e-3):
            return offset
    return None
