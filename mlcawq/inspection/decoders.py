"""Checkpoints of decoders that are quantized and evaluated, and not compiled."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mlcawq.checkpoint.decoder_config import UNLIMITED
from mlcawq.checkpoint.outline import Outline
from mlcawq.inspection.description import Description


def add_decoder(out: Description, path: Path) -> None:
    """Sizes of the decoder, off transformers' model without weights, and what tensors it lacks."""
    outline = out.attempt(lambda: Outline(path))
    if outline is None:
        return
    config, seen = outline.config, set()
    parameters = 0
    for name, shape, source in outline.names.expected():
        if (source or name) not in seen:  # tied tensors count once
            seen.add(source or name)
            parameters += prod(shape)
    longest = config.max_position_embeddings
    out.facts.update(
        {
            "parameters": parameters,
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context": "unlimited" if longest == UNLIMITED else longest,
            "tied embeddings": config.tie_word_embeddings,
            "dtype": config.dtype,
            "scaling groups": "by table" if outline.table else "traced when it is quantized",
        }
    )
    experts = {name.split(".experts.")[1].split(".")[0] for name in _experts(outline)}
    if experts:
        out.facts["experts"] = f"{len(experts)} a layer"
    out.problems.extend(outline.problems())


def _experts(outline: Outline) -> list[str]:
    last = outline.num_blocks - 1  # the first layers of some mixtures are dense
    return [name for name in outline.linear_shapes(last) if ".experts." in f".{name}"]
