"""The scaling groups of an architecture that has no table, worked out from one decoder block.

What a table says can be seen by running a block. Linears that are given equal tensors read one
tensor. An earlier norm or linear can absorb a scale of that tensor's channels if what lies between
works on each channel alone and in proportion: multiplying its output rows by numbers multiplies
each channel by the number of one row, the same on every token. Attention is no obstacle, and no
riddle, to that: over a sequence of one token it gives the values back, whatever queries and keys
are. What is found is believed only when folding random scales leaves the block's output as it was
(in float64, on sequences).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mlcawq.families.base import Architecture, Rows, ScalingGroup, linear_names
from mlcawq.families.instrument import Arguments, Call, InstrumentedBlock
from mlcawq.families.norms import multiplies_by_weight
from mlcawq.families.rows import rows_of

_TOKENS = 48  # single-token sequences that a block is looked at on; more where experts share them
_TOKENS_AN_EXPERT = 16
_LENGTH = 6  # tokens of the sequences on which folding is verified
_FACTORS = (0.5, 2.0)
_EQUAL = 1e-4  # norms compute in float32 whatever they are given
_ROW_KINDS: tuple[Rows, ...] = (
    "heads",
    "v_concatenated",
    "v_grouped",
    "v_after_k",
    "second_half",
)


def trace_block(
    block: nn.Module, arguments: Arguments, hidden_size: int, head_dim: int
) -> tuple[ScalingGroup, ...]:
    """The scaling groups of a decoder block, in the order in which it computes.

    block: in any type and with any weights; it is left alone. arguments: keyword arguments of its
    call for a batch and a number of tokens. head_dim: of a value head, to name what is found.

    Experts with a module each are found by their numbers and come as one group with `*`.
    """
    return _Tracer(block, arguments, hidden_size, head_dim).groups()


def traced_architecture(
    known: Architecture, layouts: Iterable[tuple[ScalingGroup, ...]]
) -> Architecture:
    """`known` with the groups of its blocks, as `trace_block` found them for each kind of block."""
    first, *others = dict.fromkeys(layouts)
    return replace(known, groups=first, layouts=tuple(others))


def described(groups: Iterable[ScalingGroup]) -> list[str]:
    """What was found, a line for each group, for people."""
    lines = []
    for group in groups:
        readers = ", ".join(group.linears)
        also = f" (and {', '.join(group.also)}, kept)" if group.also else ""
        if group.previous is None:
            lines.append(f"{readers}{also}: nothing before can absorb a scale")
        else:
            which = group.rows if isinstance(group.rows, str) else "by a row map"
            rows = "" if which == "heads" else f", {which.replace('_', ' ')}"
            lines.append(f"{readers}{also}: scaled by {group.previous}{rows}")
    return lines


@dataclass
class _Tensor:
    """What several modules read. instances: of the readers, before experts became `*`."""

    values: torch.Tensor
    readers: list[str]


class _Tracer:
    def __init__(
        self, block: nn.Module, arguments: Arguments, hidden_size: int, head_dim: int
    ) -> None:
        self._traced = InstrumentedBlock(block, arguments, hidden_size)
        self._head_dim = head_dim
        self._modules = dict(self._traced.block.named_modules())
        self._linears = set(linear_names(self._traced.block))
        self._experts = _expert_containers(self._modules)
        most = max((count for count in self._experts.values()), default=0)
        self._hidden = self._traced.hidden(max(_TOKENS, most * _TOKENS_AN_EXPERT), 1)
        self._calls: dict[str, Call] = {}
        self._traced.run(self._hidden, watch=self._calls)

    def groups(self) -> tuple[ScalingGroup, ...]:
        found = [self._group(tensor) for tensor in self._tensors()]
        seen = {name for group in found for name in (*group.linears, *group.also)}
        unused = [
            ScalingGroup(None, (name,), name)
            for name in dict.fromkeys(map(self._pattern, sorted(self._linears)))
            if name not in seen
        ]
        return (*found, *unused)

    # Experts

    def _pattern(self, name: str) -> str:
        """The name with `*` for the number of an expert."""
        for container in self._experts:
            if name.startswith(f"{container}."):
                rest = name.removeprefix(f"{container}.").partition(".")[2]
                return f"{container}.*.{rest}"
        return name

    def _every(self, name: str) -> list[str]:
        """The modules that a name, or a pattern, stands for."""
        pattern = self._pattern(name)
        if "*" not in pattern:
            return [pattern]
        return [other for other in self._modules if self._pattern(other) == pattern]

    def _busiest(self) -> list[str]:
        """Modules with a weight matrix in the order of their calls: of experts, those of one."""
        named: dict[str, str] = {}
        for name, call in self._calls.items():
            weight = getattr(self._modules[name], "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not call.inputs:
                continue
            if call.inputs[0].shape[-1] != weight.shape[1]:
                continue
            pattern = self._pattern(name)
            known = named.get(pattern)
            if known is None or _rows(self._calls[known].inputs[0]) < _rows(call.inputs[0]):
                named[pattern] = name
        return list(named.values())

    # Who reads what

    def _tensors(self) -> list[_Tensor]:
        tensors: list[_Tensor] = []
        for name in self._busiest():
            values = self._calls[name].inputs[0].flatten(0, -2)
            for tensor in tensors:
                if _holds(tensor.values, values):
                    tensor.readers.append(name)
                    break
                if _holds(values, tensor.values):
                    tensor.values = values
                    tensor.readers.append(name)
                    break
            else:
                tensors.append(_Tensor(values, [name]))
        return [tensor for tensor in tensors if any(map(self._quantized, tensor.readers))]

    def _quantized(self, name: str) -> bool:
        """Whether it is a linear worth quantizing: no router, no gate of an expert."""
        *parents, _ = name.split(".")
        routes = any(container.split(".")[:-1] == parents for container in self._experts)
        return name in self._linears and not routes and "router" not in name.split(".")

    def _group(self, tensor: _Tensor) -> ScalingGroup:
        linears = tuple(self._pattern(name) for name in tensor.readers if self._quantized(name))
        also = tuple(self._pattern(name) for name in tensor.readers if not self._quantized(name))
        inspect, *beside = self._judged(tensor)
        group = ScalingGroup(None, linears, inspect, also=also, beside=tuple(beside))
        for name in self._candidates(tensor):
            rows = self._rows_of(name, tensor)
            if rows is not None and self._keeps_function(name, rows, tensor):
                kind = self._kind(name, rows)
                return replace(group, previous=self._pattern(name), rows=kind)
        return group

    def _judged(self, tensor: _Tensor) -> list[str]:
        """The outermost modules that are given the tensor, and that hold quantized readers."""
        outermost: list[str] = []
        for reader in filter(self._quantized, tensor.readers):
            parts = reader.split(".")
            paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
            # An expert's other linears read other things: no module of its own reads this alone.
            given = (path for path in paths if self._is_given(path, tensor))
            outermost.append(self._pattern(next(given, reader)))
        return list(dict.fromkeys(outermost))

    def _is_given(self, name: str, tensor: _Tensor) -> bool:
        call = self._calls.get(name)
        return call is not None and any(
            given.shape[-1] == tensor.values.shape[1]
            and given.numel() == tensor.values.numel()
            and torch.equal(given.flatten(0, -2), tensor.values)
            for given in call.inputs
        )

    # What can absorb a scale

    def _candidates(self, tensor: _Tensor) -> list[str]:
        """Norms and linears that have run before the readers, the nearest first."""
        reader = tensor.readers[0]
        expert = self._expert(reader) if len(tensor.readers) == 1 else ""
        earlier: list[str] = []
        for name, call in self._calls.items():
            if name in tensor.readers:
                break
            weight = getattr(self._modules[name], "weight", None)
            if not isinstance(weight, nn.Parameter) or len(weight) != call.output.shape[-1]:
                continue
            is_norm = weight.ndim == 1 and multiplies_by_weight(self._modules[name])
            if (is_norm or name in self._linears) and self._expert(name) in ("", expert):
                earlier.append(name)
        return earlier[::-1]

    def _expert(self, name: str) -> str:
        """Of which expert a module is a part; empty where of none."""
        for container in self._experts:
            if name.startswith(f"{container}."):
                number = name.removeprefix(f"{container}.").partition(".")[0]
                return f"{container}.{number}"
        return ""

    def _rows_of(self, name: str, tensor: _Tensor) -> torch.Tensor | None:
        """Which output row of a module each channel comes from; None where some comes from none."""
        count = self._calls[name].output.shape[-1]
        factors = self._traced.uniform(count, *_FACTORS)
        ratio = self._ratio(name, factors, tensor)
        order = factors.sort()
        nearest = torch.searchsorted(order.values, ratio.nan_to_num(0.0)).clamp(1, count - 1)
        below, above = order.values[nearest - 1], order.values[nearest]
        nearest = torch.where(ratio - below < above - ratio, nearest - 1, nearest)
        rows = order.indices[nearest]
        width = torch.log(torch.tensor(_FACTORS[1] / _FACTORS[0])) / count
        if bool(((factors[rows] / ratio).log().abs() < width / 4).all()):
            return rows
        if count > tensor.values.shape[1]:
            return self._rows_by_bits(name, count, tensor)
        return None

    def _rows_by_bits(self, name: str, count: int, tensor: _Tensor) -> torch.Tensor | None:
        """As `_rows_of`, where each channel also depends on one other row in another way.

        The activation of a fused [gate; up] spoils a look at all rows at once. Scaling half of
        them, those with a bit of their number set and then the others, leaves one look in which
        the channel's own row and the other one are told apart.
        """
        index = torch.arange(count)
        rows = torch.zeros(tensor.values.shape[1], dtype=torch.long)
        for bit in range((count - 1).bit_length()):
            chosen = (index >> bit & 1).bool()
            with_bit, without = (
                self._ratio(name, torch.where(half, 2.0, 1.0).double(), tensor)
                for half in (chosen, ~chosen)
            )
            doubled = [(ratio - 2).abs() < _EQUAL for ratio in (with_bit, without)]
            still = [(ratio - 1).abs() < _EQUAL for ratio in (with_bit, without)]
            one = doubled[0] | still[1] & ~still[0]
            zero = doubled[1] | still[0] & ~still[1]
            if not bool((one ^ zero).all()):
                return None
            rows |= one.long() << bit
        return rows if bool((rows < count).all()) else None

    def _ratio(self, name: str, factors: torch.Tensor, tensor: _Tensor) -> torch.Tensor:
        """What each channel of the tensor is multiplied by when the outputs of a module are, [K];
        not a number where that differs between tokens.
        """
        reader = max(tensor.readers, key=lambda reader: _rows(self._calls[reader].inputs[0]))
        found = self._traced.inputs_of(reader, self._hidden, outputs={name: factors})
        if found is None or found.shape != tensor.values.shape:
            return torch.full((tensor.values.shape[1],), torch.nan)
        size = tensor.values.square().sum(0)
        ratio = (found * tensor.values).sum(0) / size
        rest = (found - tensor.values * ratio).square().sum(0)
        return torch.where(rest <= size * _EQUAL**2, ratio, torch.nan)

    def _keeps_function(self, name: str, rows: torch.Tensor, tensor: _Tensor) -> bool:
        """Whether folding random scales, into all experts at once, leaves the output as it is."""
        drawn = self._traced.uniform(self._calls[name].output.shape[-1], *_FACTORS)
        used = torch.zeros(len(drawn), dtype=torch.bool)
        used[rows] = True
        divided = {other: torch.where(used, 1 / drawn, 1.0) for other in self._every(name)}
        multiplied = {
            other: drawn[rows] for reader in tensor.readers for other in self._every(reader)
        }
        hidden = self._traced.hidden(max(2, len(self._hidden) // (8 * _LENGTH)), _LENGTH)
        before = self._traced.run(hidden)
        after = self._traced.run(hidden, inputs=multiplied, outputs=divided)
        return bool((after - before).norm() <= _EQUAL * before.norm())

    def _kind(self, name: str, rows: torch.Tensor) -> Rows | tuple[int, ...]:
        """The name of a row map, or the map."""
        outputs = self._calls[name].output.shape[-1]
        if torch.equal(rows, torch.arange(outputs)):
            return "heads"
        for kind in _ROW_KINDS if name in self._linears else ():
            try:
                if torch.equal(rows_of(kind, len(rows), outputs, self._head_dim), rows):
                    return kind
            except (ValueError, RuntimeError):
                continue
        return tuple(rows.tolist())


def _expert_containers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Modules whose children are numbered, alike and have linears in them; how many they have."""
    found = {}
    for name, module in modules.items():
        children = dict(module.named_children())
        if len(children) < 2 or not all(key.isdigit() for key in children):
            continue
        kinds = {
            tuple((inner, tuple(part.weight.shape)) for inner, part in _linears(child))
            for child in children.values()
        }
        if len(kinds) == 1 and next(iter(kinds)):
            found[name] = len(children)
    return found


def _linears(module: nn.Module) -> Iterable[tuple[str, Any]]:
    return [
        (name, part)
        for name, part in module.named_modules()
        if name and isinstance(part, nn.Linear)
    ]


def _rows(values: torch.Tensor) -> int:
    return values.numel() // values.shape[-1]


def _holds(tensor: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether every row of `part` [t, K] is a row of `tensor` [T, K]."""
    if tensor.shape[1] != part.shape[1] or len(part) > len(tensor):
        return False
    if len(part) == len(tensor):
        return torch.equal(tensor, part)
    nearest = torch.cdist(part, tensor).argmin(1)
    return torch.equal(tensor[nearest], part)
