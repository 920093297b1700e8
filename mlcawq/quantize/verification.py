"""A last look at what was written: it must be what the search computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.quantize.integer import QuantizedWeight

# Tensors outside of the linears are computed with in float32 and stored in float16. That moves the
# divergence by far less than this part of it, and this much where there is hardly any.
_RELATIVE, _ABSOLUTE = 0.1, 1e-3


def digest_of(weight: QuantizedWeight) -> str:
    """SHA-256 of what a linear computes with, as float16 [N, K]: the same in every format."""
    return _digest(weight.dequantized().T)


def _digest(weight: torch.Tensor) -> str:
    content = weight.to(torch.float16).contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()


def check_weights(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise UserError naming every linear of the written `folder` that is not what was searched.

    digests: of `digest_of`, by the linear's full name.
    """
    model = StreamedModel(folder)
    raise_all(
        Problem(
            "what was written is not what was computed",
            f"{name}.weight",
            "the disk or the memory of this machine may be failing: run the same command again",
        )
        for name, digest in digests.items()
        if _digest(model.tensor(f"{name}.weight")) != digest
    )


@torch.no_grad()
def check_function(
    folder: Path,
    model: StreamedModel,
    ids: torch.Tensor,
    original: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """Raise UserError where the written `folder` predicts otherwise than what was measured.

    ids: [T], some text. original: [T, hidden_size], what the blocks of `model` make of it. logits:
    [T, vocabulary], what the quantization makes of it.
    """
    (states,) = (written := StreamedModel(folder)).hidden_states([ids.unsqueeze(0)])
    expected = model.head(original).log_softmax(-1)
    measured = _divergence(expected, logits)
    found = _divergence(expected, written.head(states[0].to(logits.device)))
    if not abs(found - measured) <= _RELATIVE * measured + _ABSOLUTE:
        raise UserError.one(
            f"the written model has a KL divergence of {found:.5f} from the original where "
            f"{measured:.5f} was measured",
            str(folder),
            "nothing was put into its place; please report this with the recipe and the model",
        )


def _divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    found = logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean(dtype=torch.float64))
