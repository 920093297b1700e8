"""The rotated model, and the proof that it computes what the original one does."""

from __future__ import annotations

from dataclasses import replace

import torch

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.recipe import RotationRecipe
from mlcawq.quantize.rotation.hadamard import Rotation
from mlcawq.quantize.rotation.plan import ADVICE, plan_rotation
from mlcawq.quantize.rotation.reader import RotatedReader

_TOKENS = 8
_TOLERANCE = 1e-3  # relative, of what float32 leaves of two orders of summation


def rotated_model(model: StreamedModel, recipe: RotationRecipe) -> StreamedModel:
    """`model` with its residual stream rotated: the same function of other weights.

    The result reads the same folder, through a RotatedReader, and nothing is written. A head that
    was tied to the embedding is one of its own. Raises UserError where the architecture does not
    allow a rotation.
    """
    plan, stream = plan_rotation(model.outline, model.architecture, recipe)
    rotated = StreamedModel(model.folder, model.dtype, reader=RotatedReader(model.reader, plan))
    if plan.copies:
        raw = {**model.config.raw, "tie_word_embeddings": False}
        config = replace(rotated.config, tie_word_embeddings=False, raw=raw)
        rotated.config = rotated.outline.config = config
    _check(model, rotated, stream)
    return rotated


@torch.no_grad()
def _check(model: StreamedModel, rotated: StreamedModel, stream: Rotation) -> None:
    """Compare both on a few tokens: what enters the first block, two blocks, the head."""
    ids = torch.arange(_TOKENS).unsqueeze(0) % model.config.vocab_size
    before, after = model.embed(ids), rotated.embed(ids)
    _compare(stream.apply(before), after, "the embedding")
    for i in sorted({0, model.num_blocks - 1}):
        before = model.run_block(model.block(i), i, before)
        after = rotated.run_block(rotated.block(i), i, after)
        _compare(stream.apply(before), after, model.block_name(i))
    _compare(model.head(before), rotated.head(after), "the head")


def _compare(expected: torch.Tensor, found: torch.Tensor, where: str) -> None:
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not difference < _TOLERANCE:
        raise UserError.one(
            "the architecture does something to the residual stream that cannot be rotated with "
            f"it (relative difference {difference:.1g})",
            where,
            ADVICE,
        )
