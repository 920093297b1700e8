"""A checkpoint that computes the same with outlier channels in its activations.

Large models have a few channels whose activations are many times larger than the rest; small
ones hardly do. Here some are made: a channel of a norm or linear is multiplied by a power of two
and the columns of the linears that read it are divided by it, which leaves every function as it
was and is exact in floating point (in norms that add one to their weight, up to its rounding).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from mlcawq.checkpoint.source import copy_side_files
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.checkpoint.writing import ShardWriter, staged_folder
from mlcawq.families.rows import value_head_dim
from mlcawq.quantize.folding import channel_rows, fold_scale


def add_outliers(
    folder: Path,
    out: Path,
    *,
    fraction: float = 0.02,
    factor: int = 16,
    shared_heads: bool = False,
    seed: int = 0,
) -> Path:
    """Write the checkpoint `folder` to `out` with `fraction` of each group's channels grown.

    The groups are the architecture's scaling groups: norm -> q, k, v; v -> o; norm -> gate, up;
    up -> down. factor: a power of two. shared_heads: v -> o too where query heads share a
    key-value head; AutoAWQ does not scale that group, so growing it is no fair comparison.
    """
    if factor & (factor - 1):
        raise ValueError(f"{factor} is not a power of two")
    model = StreamedModel(folder)
    head_dim = value_head_dim(model.config.hf)
    generator = np.random.default_rng(seed)
    changed: dict[str, torch.Tensor] = {}
    for i in range(model.num_blocks):
        block = model.block(i)
        for group in model.architecture.groups_of(block):
            if group.previous is None:
                continue
            rows = channel_rows(block, group, head_dim)
            readers = [block.get_submodule(name) for name in (*group.linears, *group.also)]
            width = readers[0].weight.shape[1]
            # Of a channel each, or of several where heads share their values.
            source = torch.arange(width) if rows is None else rows.unique(return_inverse=True)[1]
            count = int(source.max()) + 1
            if count != width and not shared_heads:
                continue
            chosen = generator.choice(count, max(1, round(fraction * count)), replace=False)
            grown = torch.ones(count)
            grown[chosen] = factor
            fold_scale(
                block.get_submodule(group.previous),
                readers,
                1 / grown[source],
                rows,
                where=group.previous,
            )
        for name, tensor in block.state_dict().items():
            changed[model.checkpoint_name(i, name)] = tensor
    with staged_folder(out) as stage:
        shutil.copyfile(folder / "config.json", stage / "config.json")
        copy_side_files(folder, stage)
        writer = ShardWriter(stage)
        for name in model.reader.names:
            stored = model.reader.torch(name)
            writer.add(name, changed.get(name, stored).to(stored.dtype))
        writer.close()
    return out
