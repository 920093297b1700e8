"""Checkpoint -> tensor-cache.json and params_shard_*.bin, as mlc_llm writes and loads them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcawq.build.chat_config import agreed_layout, agreed_tables
from mlcawq.build.loading_order import loading_order
from mlcawq.build.rounded_table import Arrays, round_table
from mlcawq.build.weight_plan import Parameter, has_own_head, plan_parameters
from mlcawq.checkpoint.config import ModelConfig, read_config
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import (
    check_folder,
    disk_error,
    free_bytes,
    scratch_folder,
    write_file,
    write_json,
)
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import expected_tensors
from mlcawq.graph.settings import infer_quantization
from tir_kernels.layouts import BLOCKED

SHARD_BYTES = 32 * 2**20
ALIGNMENT = 64  # bytes, that compiled kernels assume of every tensor
CACHE = "tensor-cache.json"

Progress = Callable[[str, int, int], None]  # parameter's name, bytes done, bytes in all


@dataclass(frozen=True)
class Conversion:
    """quantization: the name it has in MLC. weight_layout: None for unquantized weights.

    bits_per_parameter counts scales and zeros in.
    """

    quantization: str
    weight_layout: str | None
    num_parameters: int
    total_bytes: int
    bits_per_parameter: float


def convert_weight(
    checkpoint: Path,
    out: Path,
    quantization: str | None = None,
    *,
    weight_layout: str | None = None,
    head: str | None = None,
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the parameters of `checkpoint` into the folder `out`, replacing earlier ones there.

    quantization: a name to insist on; by default what the checkpoint is. weight_layout: of
    quantized weights (`tir_kernels.layouts`), by default the one that mlc-chat-config.json in `out`
    names, else the stock one. head: one of `graph.tables.HEADS`, by default as that file says, else
    what fits the layout. Tensors are streamed: one parameter and one shard are in memory at a
    time. Other files of `out` stay as they are, and so do its parameters until all new ones are
    written. Raises UserError for whatever does not fit together, before anything is written, and
    for values that overflow float16.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_folder(out)
    config = config or read_config(checkpoint)
    reader = TensorReader(checkpoint)
    layout = agreed_layout(out, weight_layout)
    own = has_own_head(config, reader)
    tables = agreed_tables(out, config, head, packed=layout == BLOCKED, own=own)
    kind = infer_quantization(config, quantization, layout, tables)
    plan = plan_parameters(config, kind, reader)
    planned = {parameter.name: parameter for parameter in plan}
    order = loading_order({name: planned[name].sources for name in planned}, reader)
    plan = [planned[name] for name in order]
    total = sum(parameter.nbytes for parameter in plan)
    if free_bytes(out) < total:
        raise UserError.one(
            f"the parameters need {total / 1e9:.2f} GB and {free_bytes(out) / 1e9:.2f} GB are free",
            str(out),
            "free some space, or choose another -o",
        )
    stage = scratch_folder(out, ".params.partial-")
    try:
        shards = _ShardWriter(stage)
        overflowing: list[Problem] = []
        for parameter, array in _arrays(plan, reader, overflowing):
            shards.add(parameter, array)
            if progress is not None:
                progress(parameter.name, shards.total_bytes, total)
        raise_all(overflowing)
        records = shards.close()
        logical = sum(prod(shape) for shape in expected_tensors(config).values())
        metadata = {
            "ParamSize": len(plan),
            "ParamBytes": float(total),
            "BitsPerParam": total * 8.0 / logical,
        }
        _publish(stage, out, {"metadata": metadata, "records": records})
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Conversion(kind.name, kind.weight_layout, len(plan), total, metadata["BitsPerParam"])


def _arrays(
    plan: list[Parameter], reader: TensorReader, overflowing: list[Problem]
) -> Iterator[tuple[Parameter, np.ndarray]]:
    rounded: Arrays = {}  # what is left of a rounded table, whose arrays follow one another
    for parameter in plan:
        relayout, rounding = parameter.relayout, parameter.rounding
        if parameter.constant is not None:
            stock_shape = parameter.shape if relayout is None else relayout.stock_shape
            array: np.ndarray = np.full(stock_shape, parameter.constant, parameter.dtype)
            yield parameter, array if relayout is None else relayout(array)
            continue
        if rounding is not None:
            if rounding.kind not in rounded:
                rounded = _rounded(parameter, reader, overflowing)
            yield parameter, rounded.pop(rounding.kind)
            continue
        parts = []
        for name in parameter.sources:
            source = reader.numpy(name)
            part = source
            if str(source.dtype) != parameter.dtype:
                with np.errstate(over="ignore"):  # reported below, by name
                    part = source.astype(parameter.dtype)
                if not np.isfinite(part).all():
                    overflowing.append(_overflow(name, source, reader))
            parts.append(part)
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, parameter.axis)
        del parts, part, source  # or they would be held while the next parameter is read
        yield parameter, array if relayout is None else relayout(array)


def _rounded(parameter: Parameter, reader: TensorReader, overflowing: list[Problem]) -> Arrays:
    """All arrays of the table that `parameter` is the first one of."""
    assert parameter.rounding is not None
    (name,) = parameter.sources
    source = reader.numpy(name)
    arrays = round_table(source, parameter.rounding.table, parameter.rounding.scale_dtype)
    if not np.isfinite(arrays["scales"]).all():
        overflowing.append(_overflow(name, source, reader))
    return arrays


def _overflow(name: str, source: np.ndarray, reader: TensorReader) -> Problem:
    values: np.ndarray = source.astype(np.float32)
    if not np.isfinite(values).all():
        return Problem(f"{name} holds values that are not finite", str(reader.folder))
    return Problem(
        f"{name} holds {np.abs(values).max():.4g}, more than float16 can (65504)",
        str(reader.folder),
        "build with --quantization q0f32, or rescale the checkpoint",
    )


def _publish(stage: Path, out: Path, cache: dict[str, Any]) -> None:
    """Put finished shards in place. The cache file goes first and comes last: whoever finds one
    finds the shards that it lists.
    """
    (out / CACHE).unlink(missing_ok=True)
    for old in out.glob("params_shard_*.bin"):
        old.unlink()
    for shard in stage.iterdir():
        shard.rename(out / shard.name)
    write_json(out / CACHE, cache)


class _ShardWriter:
    """Parameters in files of at most SHARD_BYTES, a larger parameter in one of its own.

    The bounds are those of TVM's `dump_tensor_cache`, so that mlc_llm's files and ours are the
    same: a file stays below SHARD_BYTES, and a parameter of half of it or more that would not fit
    is written at once, while smaller ones go on to collect. What differs are zeros behind
    parameters of odd sizes: each begins at a multiple of ALIGNMENT, so that the engine can use
    files as they are mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        self.pending: list[tuple[dict[str, Any], np.ndarray]] = []
        self.pending_bytes = 0
        self.total_bytes = 0

    def add(self, parameter: Parameter, array: np.ndarray) -> None:
        if array.shape != parameter.shape or str(array.dtype) != parameter.dtype:
            raise ValueError(f"{parameter.name}: {array.dtype} {array.shape} is not as planned")
        record = {
            "name": parameter.name,
            "shape": list(array.shape),
            "dtype": parameter.stored_dtype,
            "format": "raw",
            "nbytes": array.nbytes,
            "byteOffset": 0,
        }
        self.total_bytes += array.nbytes
        if self.pending_bytes + array.nbytes >= SHARD_BYTES:
            if 2 * array.nbytes >= SHARD_BYTES:
                self._write([(record, array)])
                return
            self._write_pending()
        record["byteOffset"] = self.pending_bytes
        self.pending.append((record, array))
        self.pending_bytes += array.nbytes + -array.nbytes % ALIGNMENT

    def close(self) -> list[dict[str, Any]]:
        self._write_pending()
        return self.shards

    def _write_pending(self) -> None:
        if self.pending:
            self._write(self.pending)
        self.pending, self.pending_bytes = [], 0

    def _write(self, entries: list[tuple[dict[str, Any], np.ndarray]]) -> None:
        path = self.folder / f"params_shard_{len(self.shards)}.bin"
        parts = (array.tobytes() + bytes(-array.nbytes % ALIGNMENT) for _, array in entries)
        data = b"".join(parts)
        write_file(path, data)
        self.shards.append(
            {
                "dataPath": path.name,
                "format": "raw-shard",
                "nbytes": len(data),
                "records": [record for record, _ in entries],
                "md5sum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            }
        )
