"""4-bit values in machine words, the lowest bits first."""

from __future__ import annotations

import torch


def pack(values: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """Values 0..15, uint8 [..., M] -> words [..., M * 4 / bits of a word].

    The first value of a word is in its lowest four bits.
    """
    pairs = values.contiguous().view(*values.shape[:-1], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).view(word)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Words [..., W] -> values, uint8 [..., W * bits of a word / 4]: the inverse of `pack`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
