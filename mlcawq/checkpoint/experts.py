"""Mixtures of experts with one module an expert.

transformers 5 keeps the experts of a layer as one tensor a projection, [experts, out, in];
checkpoints, and everything that looks at single linears, have one matrix an expert. `unfused`
replaces the first by modules that hold the second. Which tokens go where is still decided by the
model's own router, which calls the experts with its choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the projections of an expert. gate: None where there is none."""

    gate: str | None
    up: str
    down: str

    @property
    def all(self) -> tuple[str, ...]:
        """The names of the projections, in the order of computation."""
        return (*((self.gate,) if self.gate else ()), self.up, self.down)


USUAL_NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")


def is_fused(module: nn.Module) -> bool:
    """Whether `module` is transformers' fused experts in a form that can be taken apart."""
    # `use_experts_implementation` gives a class these, and says by them how it computes.
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
    if not all(hasattr(module, flag) for flag in flags):
        return False
    if not hasattr(module, "act_fn") and (_gates_as_usual(module) or not module.has_gate):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return all(
        getattr(getattr(module, name, None), "ndim", 0) == 3 for name in (first, "down_proj")
    )


def _gates_as_usual(fused: Any) -> bool:
    return bool(type(fused)._apply_gate.__module__ == "transformers.integrations.moe")


def fused_experts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The fused experts in a block, with their paths in it."""
    for path, module in block.named_modules():
        if is_fused(module):
            yield path, module


def unfused(block: nn.Module, names: ExpertNames = USUAL_NAMES) -> nn.Module:
    """`block` itself, its fused experts replaced by one module an expert, on their device."""
    for path, module in list(fused_experts(block)):
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, Experts(module, names))
    return block


class Expert(nn.Module):
    """One expert: tokens [t, hidden] -> down(act(gate(x)) * up(x)), down(act(up(x))) without gate.

    routed_tokens: which of the flat tokens b * T + i it was given in the last forward, int64 [t].
    routing_weights: what its outputs were multiplied by, [t].
    """

    def __init__(self, fused: Any, names: ExpertNames, gating: _Gating) -> None:
        super().__init__()
        self.names = names
        inner, hidden = _widths(fused)
        for name in names.all:
            k, n = (inner, hidden) if name == names.down else (hidden, inner)
            weight = fused.down_proj
            linear = nn.Linear(k, n, fused.has_bias, device=weight.device, dtype=weight.dtype)
            self.add_module(name, linear.requires_grad_(False))
        self.act_fn: Any = getattr(fused, "act_fn", None)
        self._gating = gating
        self.routed_tokens: torch.Tensor = torch.empty(0, dtype=torch.long)
        self.routing_weights: torch.Tensor = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.get_submodule(self.names.up)(x)
        if self.names.gate is None:
            inner = self.act_fn(up)
        else:
            inner = self._gating(self.get_submodule(self.names.gate)(x), up)
        return self.get_submodule(self.names.down)(inner)


class Experts(nn.ModuleDict):
    """The experts of a layer, called by its router as transformers' fused ones are.

    Children are named by number, as in checkpoints ("3.gate_proj").
    """

    def __init__(self, fused: Any, names: ExpertNames) -> None:
        names = names if fused.has_gate else ExpertNames(None, names.up, names.down)
        gating = _Gating(fused)
        super().__init__({str(e): Expert(fused, names, gating) for e in range(fused.num_experts)})
        self.names = names
        self.num_experts = fused.num_experts
        self.post_expert_norm = getattr(fused, "post_expert_norm", None)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [t, hidden] with the experts [t, k] and weights [t, k] chosen for each."""
        result = torch.zeros_like(hidden_states)
        # An index of num_experts or more is a choice that is to be dropped.
        for e in range(self.num_experts):
            expert = self[str(e)]
            tokens, choice = torch.where(top_k_index == e)
            weights = top_k_weights[tokens, choice]
            expert.routed_tokens, expert.routing_weights = tokens, weights
            if len(tokens):
                output = expert(hidden_states[tokens])
                if self.post_expert_norm is not None:
                    output = self.post_expert_norm(output)
                result.index_add_(0, tokens, (output * weights[:, None]).to(result.dtype))
        return result


class _Gating:
    """What a class of experts makes of gate and up, [t, inner] each: usually act(gate) * up.

    Some classes clamp or shift in a method of theirs, which looks up settings in the module: it is
    asked then, on a module of that class without the weights.
    """

    def __init__(self, fused: Any) -> None:
        self._act: Any = getattr(fused, "act_fn", None)
        self._usual = _gates_as_usual(fused)
        self._module: Any = object.__new__(type(fused))
        nn.Module.__init__(self._module)
        settings = {k: v for k, v in vars(fused).items() if k not in vars(self._module)}
        vars(self._module).update(settings)
        self._module._modules.update(fused._modules)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self._usual:
            return self._act(gate) * up
        if self._module.is_concatenated:
            both = torch.cat([gate, up], dim=-1)
        else:
            both = torch.stack([gate, up], dim=-1).flatten(-2)
        return self._module._apply_gate(both)


def split_fused(
    fused: Any, names: ExpertNames, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fused tensors by their names in `fused` -> those of `Experts`, by theirs. Views, no copies.

    tensors: gate_up_proj [experts, 2 * inner, hidden] (or up_proj), down_proj [experts, hidden,
        inner], as `fused` orders their axes, and the biases where it has them.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        projection = name.removesuffix("_bias")
        kind = "bias" if name.endswith("_bias") else "weight"
        for e, part in enumerate(tensor):
            matrix = part.T if fused.is_transposed and kind == "weight" else part
            if projection == "gate_up_proj":
                half = len(matrix) // 2
                gate, up = (
                    (matrix[:half], matrix[half:])
                    if fused.is_concatenated
                    else (matrix[::2], matrix[1::2])
                )
                result[f"{e}.{names.gate}.{kind}"] = gate
                result[f"{e}.{names.up}.{kind}"] = up
            else:
                own = names.down if projection == "down_proj" else names.up
                result[f"{e}.{own}.{kind}"] = matrix
    return result


def _widths(fused: Any) -> tuple[int, int]:
    """(inner, hidden) of an expert, off the shape of its last projection."""
    _, rows, columns = fused.down_proj.shape
    return (rows, columns) if fused.is_transposed else (columns, rows)
