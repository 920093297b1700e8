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

_MOST_PARTS = 5  # tensors that any format makes of one
# By model_type: the module that AutoAWQ puts a scale behind, and the linear before it.
_SCALED_ACTIVATIONS = {
    "bloom": ("gelu_impl", "dense_h_to_4h"),
    "falcon": ("act", "dense_h_to_4h"),
    "gpt_bigcode": ("act", "c_fc"),
    "gpt_neox": ("act", "dense_h_to_4h"),
    "gptj": ("act", "fc_in"),
    "mpt": ("act", "up_proj"),
    "starcoder2": ("act", "c_fc"),
}


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


def companions(outline: Outline, fmt: Format) -> Iterator[tuple[str, torch.Tensor]]:
    """What readers of a format want beside the model's own tensors, which changes no number.

    That is a head of its own where the model's is its embedding, for readers that take one file;
    and ones, by which AutoAWQ, llm-awq and transformers divide the activation between an MLP's
    linears in those families in which AutoAWQ moves a scale there. Where they are missing,
    transformers makes numbers up.
    """
    names, skeleton = outline.names, outline.skeleton
    head = f"{names.stored_name(skeleton.head)}.weight"
    source = names.source_of(f"{skeleton.head}.weight")
    if fmt.one_file and source is not None and head not in outline.stored.names:
        yield head, half(outline.stored.as_stored(source), head).clone()
    if fmt.scales_activations and outline.config.model_type in _SCALED_ACTIVATIONS:
        activation, before = _SCALED_ACTIVATIONS[outline.config.model_type]
        for i, block in enumerate(outline.blocks):
            for path, module in block.named_modules():
                if hasattr(module, activation) and hasattr(module, before):
                    size = getattr(module, before).out_features
                    name = outline.checkpoint_name(i, f"{path}.{activation}.scales")
                    yield name, torch.ones(size, dtype=torch.float16)
