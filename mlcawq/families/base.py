"""What the rest of the project needs to know of an architecture: a table, not code."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mlcawq.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Rows = Literal["heads", "v_concatenated", "v_grouped", "v_after_k", "second_half"]


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that read one tensor, and the operation that can absorb their input scales.

    AWQ (arXiv 2306.00978, section 3.2) multiplies the columns of `linears` by s and divides the
    output channels of `previous` by s. Names are relative to a decoder block; `*` stands for the
    index of an expert. A group whose `previous` or `inspect` has a `*` is one group an expert,
    otherwise its linears are those of all experts.

    previous: the norm or linear before, whose output channels are divided. None where nothing can
        absorb a scale: a residual stream, a norm without weights, an activation in between.
    linears: all readers of that output that are quantized.
    inspect: the module whose output error the search looks at.
    also: readers that stay as they are and take the scale too: routers, gates of shared experts.
    rows: which output channels of `previous` the readers' input channels come from: one for each
        of these, or
        "heads": the same ones; with fewer value heads than query heads, those of the value head
            that a query head reads.
        "v_concatenated": of a fused [q; k; v], the last part.
        "v_grouped": of a fused qkv, the last head of each group of query heads, key and value.
        "v_after_k": of a fused [k; v] of each head, the second part (multi-head latent attention).
        "second_half": of a fused [gate; up], the part that no activation is applied to.
    beside: other modules that read the same tensor and no other, whose output errors count too:
        the MLP, where it is computed beside the attention.
    given: an attribute of the block, by its path, and the value that it must have for `previous`
        to absorb anything; otherwise the group is one without.
    """

    previous: str | None
    linears: tuple[str, ...]
    inspect: str
    also: tuple[str, ...] = ()
    rows: Rows | tuple[int, ...] = "heads"
    beside: tuple[str, ...] = ()
    given: tuple[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of transformers, as far as quantization needs to know it.

    model_type, architectures: config.json's.
    groups: the AWQ scaling groups, in the order in which a block computes. What a block lacks of
        them (a layer without experts, a query without low-rank projection) is left out.
    layouts: the groups of blocks that `groups` does not describe, under other settings.
    block: the name pattern of decoder block i.
    """

    model_type: str
    architectures: tuple[str, ...]
    groups: tuple[ScalingGroup, ...]
    layouts: tuple[tuple[ScalingGroup, ...], ...] = ()
    block: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def groups_of(self, block: nn.Module) -> tuple[ScalingGroup, ...]:
        """The groups of one decoder block, without `*` and without what the block lacks.

        Raises UserError naming the linears that no layout of this architecture accounts for.
        """
        names = {name: None for name, _ in block.named_modules()}
        linears = linear_names(block)
        left: list[list[str]] = []
        for layout in (self.groups, *self.layouts):
            found = tuple(part for group in layout for part in _expanded(group, names))
            known = {name for group in found for name in (*group.linears, *group.also)}
            left.append([name for name in linears if name not in known])
            lacking = [group for group in found if group.previous not in (None, *names)]
            if not left[-1] and not lacking:
                return tuple(_able(group, block) for group in found)
        shortest = min(left, key=len)
        raise UserError.one(
            f"the table of {self.model_type} does not describe this decoder block",
            ", ".join(shortest) or type(block).__name__,
            "the model is of another revision of the architecture than the installed transformers",
        )


def _able(group: ScalingGroup, block: nn.Module) -> ScalingGroup:
    """The group, without `previous` where that cannot absorb a scale in this block."""
    if group.previous is None:
        return group
    weight = getattr(block.get_submodule(group.previous), "weight", None)
    if group.given is None:
        met = True
    else:
        path, value = group.given
        met = operator.attrgetter(path)(block) == value
    return group if met and weight is not None else replace(group, previous=None, rows="heads")


def linear_names(block: nn.Module) -> list[str]:
    """The linears of a decoder block, by their names in it."""
    from torch import nn

    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def _expanded(group: ScalingGroup, names: Mapping[str, None]) -> Iterator[ScalingGroup]:
    """The group on a block of these modules: with the experts that it has, and nothing else."""
    if "*" in (group.previous or "") or "*" in group.inspect:
        pattern = group.linears[0]
        for index in _indices(pattern, names):
            yield from _expanded(_with_index(group, index), names)
        return
    linears = tuple(name for pattern in group.linears for name in _matches(pattern, names))
    if linears:
        also = tuple(name for pattern in group.also for name in _matches(pattern, names))
        beside = tuple(name for name in group.beside if name in names)
        yield replace(group, linears=linears, also=also, beside=beside)


def _with_index(group: ScalingGroup, index: str) -> ScalingGroup:
    def numbered(name: str) -> str:
        return name.replace("*", index)

    return replace(
        group,
        previous=None if group.previous is None else numbered(group.previous),
        linears=tuple(map(numbered, group.linears)),
        inspect=numbered(group.inspect),
        also=tuple(map(numbered, group.also)),
        beside=tuple(map(numbered, group.beside)),
    )


def _matches(pattern: str, names: Mapping[str, None]) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in names else []
    return [pattern.replace("*", index) for index in _indices(pattern, names)]


def _indices(pattern: str, names: Mapping[str, None]) -> list[str]:
    """What `*` stands for in the names that match, in their order."""
    start, _, end = pattern.partition("*")
    return [
        name[len(start) : len(name) - len(end)]
        for name in names
        if name.startswith(start)
        and name.endswith(end)
        and name[len(start) : len(name) - len(end)].isdigit()
    ]


@dataclass(frozen=True, kw_only=True)
class Family(Architecture):
    """An architecture that can be compiled as well.

    linears: the quantizable linears of a block.
    fusions: MLC's fused linears and the parts that are concatenated into each, in order.
    gate_up: the fused linear of which silu(first half) * second half is taken.
    biases: config.json's key that switches the bias of "qkv", "o", "mlp", or a constant.
    sliding_window: "never"; "always" where config's sliding_window is set; "opt-in" by
        use_sliding_window and layer_types.
    """

    linears: tuple[str, ...]
    fusions: Mapping[str, tuple[str, ...]]
    mlc_model_type: str
    gate_up: str = "mlp.gate_up_proj"
    qk_norm: bool = False
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    sliding_window: Literal["never", "always", "opt-in"] = "never"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def biased(self, part: str, raw: Mapping[str, Any]) -> bool:
        """Whether the linears of `part` ("qkv", "o", "mlp") carry a bias under this config."""
        rule = self.biases.get(part, False)
        return rule if isinstance(rule, bool) else bool(raw.get(rule, False))

    def fused_name(self, linear: str) -> str:
        """MLC's name of the linear that holds `linear` (itself where nothing is fused)."""
        for fused, parts in self.fusions.items():
            if linear in parts:
                return fused
        return linear
