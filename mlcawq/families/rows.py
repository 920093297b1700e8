"""Which output row of the operation before each channel of a scaling group comes from."""

from __future__ import annotations

from typing import Any

import torch

from mlcawq.families.base import Rows


def value_head_dim(config: Any) -> int:
    """Channels of a value head; config: of transformers, the text model's."""
    # Latent attention has values of their own width, and head_dim is the rotary part there.
    for key in ("v_head_dim", "head_dim"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return int(config.hidden_size // config.num_attention_heads)


def rows_of(kind: Rows, channels: int, outputs: int, head_dim: int) -> torch.Tensor:
    """Row of the operation before, of `outputs`, for each of `channels`: int64 [channels].

    kind: see `ScalingGroup.rows`. head_dim: of a value head. With grouped-query attention, the
    query heads that share a value head share rows.

    Raises ValueError where the numbers do not fit together.
    """
    every = torch.arange(outputs, device="cpu")
    if kind == "second_half":
        if outputs != 2 * channels:
            raise ValueError(f"{outputs} outputs are not twice {channels} channels")
        return every[channels:]
    if channels % head_dim:
        raise ValueError(f"{channels} channels are no multiple of a head of {head_dim}")
    if kind == "heads":
        values = every
    elif kind == "v_after_k":
        values = every.view(channels // head_dim, -1)[:, -head_dim:]
    else:
        # q has as many rows as there are channels; k and v share what is left.
        width = (outputs - channels) // 2
        if width < head_dim or width % head_dim:
            raise ValueError(f"{outputs} outputs are no query of {channels} with keys and values")
        if kind == "v_concatenated":
            values = every[-width:]
        else:
            values = every.view(width // head_dim, -1, head_dim)[:, -1]
    values = values.reshape(-1, 1, head_dim)
    repeats, rest = divmod(channels, values.numel())
    if rest:
        raise ValueError(f"{channels} channels are no multiple of {values.numel()} values")
    return values.expand(-1, repeats, -1).reshape(-1)
