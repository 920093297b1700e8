"""What the rest of the project needs to know of an architecture: a table, not code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that read one tensor, and the operation that can absorb their input scales.

    AWQ (arXiv 2306.00978, section 3.2) multiplies the columns of `linears` by s and divides the
    output channels of `previous` by s. Names are relative to a decoder block.

    previous: the norm or linear before, whose output channels are divided.
    linears: all readers of that output.
    inspect: the module whose output error the search looks at.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    block: the name pattern of decoder block i.
    linears: the quantizable linears of a block.
    groups: the AWQ scaling groups, in the order in which a block computes.
    fusions: MLC's fused linears and the parts that are concatenated into each, in order.
    gate_up: the fused linear of which silu(first half) * second half is taken.
    biases: config.json's key that switches the bias of "qkv", "o", "mlp", or a constant.
    sliding_window: "never"; "always" where config's sliding_window is set; "opt-in" by
        use_sliding_window and layer_types.
    """

    model_type: str
    architectures: tuple[str, ...]
    linears: tuple[str, ...]
    groups: tuple[ScalingGroup, ...]
    fusions: Mapping[str, tuple[str, ...]]
    mlc_model_type: str
    gate_up: str = "mlp.gate_up_proj"
    qk_norm: bool = False
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    sliding_window: Literal["never", "always", "opt-in"] = "never"
    block: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
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
