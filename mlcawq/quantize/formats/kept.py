"""Which linears of a model stay as they are: a format's config has to name them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from mlcawq.checkpoint.outline import Outline


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
