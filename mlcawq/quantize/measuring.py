"""The quantized model's predictions beside the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mlcawq.quantize.budget import LOGIT_TOKENS
from mlcawq.quantize.distributed import total
from mlcawq.quantize.report import ModelReport

Head = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def compare_predictions(
    text: Sequence[torch.Tensor],
    original: tuple[Head, Sequence[torch.Tensor]],
    quantized: tuple[Head, Sequence[torch.Tensor]],
    *,
    seen: bool,
) -> ModelReport:
    """Compare two models on token ids [B, T] each.

    original, quantized: a model's head, from hidden states [T, hidden_size] to logits, and its last
        hidden states, [B, T, hidden_size] for each of `text`. seen: calibration has used the text.
    """
    divergence = agreeing = loss = original_loss = 0.0
    tokens = predicted = 0
    heads = original[0], quantized[0]
    for ids, *states in zip(text, original[1], quantized[1], strict=True):
        for j in range(len(ids)):
            for start in range(0, ids.shape[1], LOGIT_TOKENS):
                part = slice(start, start + LOGIT_TOKENS)
                expected, found = (
                    head(hidden[j, part].cpu()).log_softmax(-1)
                    for head, hidden in zip(heads, states, strict=True)
                )
                divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
                agreeing += float((expected.argmax(-1) == found.argmax(-1)).sum())
                following = ids[j, start + 1 : start + 1 + LOGIT_TOKENS].unsqueeze(-1)
                known = len(following)
                loss -= float(found[:known].gather(-1, following).sum(dtype=torch.float64))
                original_loss -= float(
                    expected[:known].gather(-1, following).sum(dtype=torch.float64)
                )
                tokens += len(found)
                predicted += known
    divergence, agreeing, loss, original_loss = map(
        total, (divergence, agreeing, loss, original_loss)
    )
    tokens, predicted = int(total(tokens)), max(int(total(predicted)), 1)
    return ModelReport(
        tokens,
        divergence / tokens,
        agreeing / tokens,
        _perplexity(loss / predicted),
        _perplexity(original_loss / predicted),
        seen,
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # a finite number, which JSON can hold, for any model
