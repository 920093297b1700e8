"""What a format asks of a folder beside the quantized linears."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.single_file import SingleFileWriter
from mlcawq.checkpoint.writing import ShardWriter
from mlcawq.quantize.budget import SHARD_BYTES
from mlcawq.quantize.formats.base import Format, half

_MOST_PARTS = 4  # tensors that any format makes of one


def kept_linears(outline: Outline, quantized: Collection[str]) -> list[str]:
    """Full names, the head first, of what some reader could take for a linear to be quantized.

    That is every linear of transformers' model, and every matrix within a block: a router is a
    linear to one reader and something of its own to another.
    """
    model, names, stored = outline.skeleton.model, outline.names, outline.stored
    found = [names.stored_name(outline.skeleton.head)]
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.append(names.stored_name(path))
    for i in range(outline.num_blocks):
        for name in outline.block_tensors(i):
            linear, _, kind = name.rpartition(".")
            if kind == "weight" and len(stored.reader.info(name).shape) == 2:
                found.append(linear)
    return [name for name in dict.fromkeys(found) if name not in quantized]


def weights_writer(
    stage: Path, fmt: Format, names: Collection[str], shard: int = SHARD_BYTES
) -> ShardWriter | SingleFileWriter:
    """Where the tensors of a model with these, by unquantized names, go.

    shard: bytes of a file, which are in memory until it is written, where there may be several.
    """
    if fmt.one_file:
        return SingleFileWriter(stage, _MOST_PARTS * len(names) + 1)
    return ShardWriter(stage, shard)


def tied_head(outline: Outline, fmt: Format) -> Iterator[tuple[str, torch.Tensor]]:
    """A head that is stored as the embedding alone, for formats whose readers want it apart."""
    names, skeleton = outline.names, outline.skeleton
    head = f"{names.stored_name(skeleton.head)}.weight"
    source = names.source_of(f"{skeleton.head}.weight")
    if fmt.one_file and source is not None and head not in outline.stored.names:
        yield head, half(outline.stored.as_stored(source), head).clone()
