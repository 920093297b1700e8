"""A checkpoint that computes the same with outlier channels in its activations.

Large models have a few channels whose activations are many times larger than the rest; small
ones hardly do. Here some are made: a channel of a norm or linear is multiplied by a power of two
and the columns of the linears that read it are divided by it, which leaves every function as it
was and is exact in floating point.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from mlcawq.checkpoint.config import read_config
from mlcawq.checkpoint.source import copy_side_files
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import ShardWriter, staged_folder
from mlcawq.families import find_family


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

    The groups are the family's scaling groups: norm -> q, k, v; v -> o; norm -> gate, up;
    up -> down. factor: a power of two. shared_heads: v -> o too where query heads share a
    key-value head; AutoAWQ does not scale that group, so growing it is no fair comparison.
    """
    if factor & (factor - 1):
        raise ValueError(f"{factor} is not a power of two")
    config = read_config(folder)
    family, reader = find_family(config), TensorReader(folder)
    generator = np.random.default_rng(seed)
    multiply: dict[str, np.ndarray] = {}  # per output channel of a norm, linear or bias
    divide: dict[str, np.ndarray] = {}  # per input channel of a linear
    for i in range(config.num_hidden_layers):
        block = family.block.format(i)
        for group in family.groups:
            previous = f"{block}.{group.previous}"
            channels = reader.info(f"{previous}.weight").shape[0]
            inputs = reader.info(f"{block}.{group.linears[0]}.weight").shape[1]
            if channels != inputs and not shared_heads:
                continue
            grown = np.ones(channels, np.float32)
            chosen = generator.choice(channels, max(1, round(fraction * channels)), replace=False)
            grown[chosen] = factor
            multiply[f"{previous}.weight"] = multiply[f"{previous}.bias"] = grown
            for linear in group.linears:
                name = f"{block}.{linear}.weight"
                divide[name] = _to_inputs(grown, inputs, config.head_dim)
    with staged_folder(out) as stage:
        shutil.copyfile(folder / "config.json", stage / "config.json")
        copy_side_files(folder, stage)
        writer = ShardWriter(stage)
        for name in reader.names:
            stored = reader.numpy(name)
            tensor = stored.astype(np.float32)
            if name in divide:
                tensor /= divide[name]
            if name in multiply:
                tensor *= multiply[name].reshape(-1, *[1] * (tensor.ndim - 1))
            writer.add(name, tensor.astype(stored.dtype))
        writer.close()
    return out


def _to_inputs(grown: np.ndarray, inputs: int, head_dim: int) -> np.ndarray:
    """Factors of v's channels as o sees them: a key-value head serves several query heads."""
    if len(grown) == inputs:
        return grown
    heads = grown.reshape(-1, head_dim)
    return heads.repeat(inputs // len(grown), axis=0).reshape(-1)
