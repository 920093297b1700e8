"""Checkpoints of an architecture without a table: their blocks are traced."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from mlcawq.families.base import Architecture
from mlcawq.families.rows import value_head_dim
from mlcawq.families.tracing import trace_block, traced_architecture

if TYPE_CHECKING:
    from mlcawq.checkpoint.streaming import StreamedModel

# By config.json: a quantization asks more than once.
_found: dict[str, Architecture] = {}


def worked_out(model: StreamedModel) -> Architecture:
    """What a table would say of the model: the groups of one block of every kind, traced."""
    key = json.dumps(model.config.raw, sort_keys=True)
    if key not in _found:
        kinds = sorted({model.outline.like(i) for i in range(model.num_blocks)})
        layouts = [
            trace_block(
                model.block(i),
                partial(model.layer_arguments, i),
                model.config.hidden_size,
                value_head_dim(model.config.hf),
            )
            for i in kinds
        ]
        _found[key] = traced_architecture(_places(model), layouts)
    return _found[key]


def _places(model: StreamedModel) -> Architecture:
    """The architecture with everything but its groups."""
    skeleton = model.outline.skeleton
    parent, _, _ = skeleton.layers.rpartition(".")
    norms = [
        f"{parent}.{name}"
        for name, module in model.module(parent).named_children()
        if tuple(getattr(getattr(module, "weight", None), "shape", ()))
        == (model.config.hidden_size,)
    ]
    return Architecture(
        model_type=model.config.model_type,
        architectures=model.config.architectures,
        groups=(),
        block=f"{skeleton.layers}.{{}}",
        embedding=skeleton.embedding,
        final_norm=norms[-1] if norms else "",
        head=skeleton.head,
    )
