"""The reference of a build whose head and embedding are rounded, and what rounding them costs.

A library is compared with what its folder holds: the checkpoint with these tables dequantized. How
far that is from the checkpoint itself is a property of the format, not of the library, and is told
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlcawq.build.rounded_table import Arrays, read_table
from mlcawq.build.weight_plan import has_own_head
from mlcawq.checkpoint.config import ModelConfig
from mlcawq.engine.artifact import BuiltFolder
from mlcawq.evaluate.metrics import kl_divergence, log_softmax
from mlcawq.families import expected_tensors, find_family
from mlcawq.graph.tables import Table, Tables

if TYPE_CHECKING:
    from mlcawq.checkpoint.streaming import StreamedModel


@dataclass(frozen=True)
class TableLoss:
    """What rounding head and embedding changes, as PyTorch computes it.

    relative_error: of the logits, ||rounded - plain|| / ||plain||. kl: from the predictions with
    plain tables to those with rounded ones, nats a token, the mean over `tokens` of the prompts;
    None where only some layers were computed, whose predictions mean nothing.
    """

    relative_error: float
    kl: float | None
    tokens: int


@dataclass(frozen=True)
class Reference:
    """logits: [T, V] of each prompt, float32. loss: None where no table was rounded."""

    logits: list[np.ndarray]
    loss: TableLoss | None


def compute_reference(
    checkpoint: Path,
    built: BuiltFolder,
    config: ModelConfig,
    tables: Tables,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
) -> Reference:
    """The logits that the library of `built` should compute, by PyTorch in float32.

    config, tables: what `built` is. layers: those to run, None for all.
    """
    import torch

    from mlcawq.checkpoint.streaming import StreamedModel

    plain = StreamedModel(checkpoint)
    rounded = _with_tables(plain, built, config, tables)
    models = [plain] if rounded is None else [plain, rounded]
    batches = [torch.tensor([list(ids)]) for ids in prompts]
    states = [[model.embed(ids) for ids in batches] for model in models]
    for i in range(plain.num_blocks) if layers is None else layers:
        block = plain.block(i)  # the same ones in both
        states = [[plain.run_block(block, i, hidden) for hidden in each] for each in states]
        del block
    logits = [
        [model.head(hidden)[0].numpy() for hidden in each]
        for model, each in zip(models, states, strict=True)
    ]
    if rounded is None:
        return Reference(logits[0], None)
    return Reference(logits[1], _loss(*logits, complete=layers is None))


def table_bytes(config: ModelConfig, tables: Tables, dtype: str) -> int:
    """Memory that the dequantized tables take beside everything else. dtype: of their scales."""
    count = len(tables.names()) // (2 if config.tie_word_embeddings else 1)
    return count * np.dtype(dtype).itemsize * config.vocab_size * config.hidden_size


def _with_tables(
    plain: StreamedModel, built: BuiltFolder, config: ModelConfig, tables: Tables
) -> StreamedModel | None:
    """The model with the tables that `built` holds; None where they are the checkpoint's own."""
    import torch

    from mlcawq.checkpoint.overlay import Overlay
    from mlcawq.checkpoint.streaming import StreamedModel

    family, expected = find_family(config), expected_tensors(config)
    found: dict[str, Table | None] = {family.embedding: tables.embedding}
    if not config.tie_word_embeddings and not has_own_head(config, plain.reader):
        found[family.head] = tables.head
    tensors: dict[str, Any] = {}
    for name, table in found.items():
        if table is not None:
            rows = expected[f"{name}.weight"][0]
            weight = read_table(_stored(built, name), table, rows)
            tensors[f"{name}.weight"] = torch.from_numpy(weight)
    if not tensors:
        return None
    return StreamedModel(plain.folder, reader=Overlay(plain.reader, tensors))


def _stored(built: BuiltFolder, name: str) -> Arrays:
    """The arrays of a table in a built folder."""
    arrays: Arrays = {}
    for shard in built.shards:
        for record in shard.tensors:
            owner, _, kind = record.name.rpartition(".")
            if owner == name:
                dtype = np.dtype("int32" if record.dtype == "uint32" else record.dtype)
                count = record.nbytes // dtype.itemsize
                flat = np.fromfile(shard.path, dtype, count, offset=record.offset)
                arrays[kind] = flat.reshape(record.shape)
    return arrays


def _loss(
    plain: Sequence[np.ndarray], rounded: Sequence[np.ndarray], *, complete: bool
) -> TableLoss:
    ours, theirs = np.concatenate(rounded), np.concatenate(plain)
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    kl = None
    if complete:
        each = [
            kl_divergence(log_softmax(reference), log_softmax(model))
            for reference, model in zip(plain, rounded, strict=True)
        ]
        kl = float(np.concatenate(each).mean())
    return TableLoss(float(error), kl, len(ours))
