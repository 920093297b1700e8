"""Reads params_shard_*.bin onto a device, checking every shard against its md5 sum on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from mlcawq.engine.artifact import Shard, TensorRecord
from mlcawq.errors import Problem, raise_all

_AHEAD = 2  # shards read and hashed while earlier ones are copied to the device


def load_weights(shards: Sequence[Shard], names: Iterable[str], device: Any) -> list[Any]:
    """The named tensors on `device`, in the order of `names`.

    Raises UserError naming every shard whose bytes are not those that were written.
    """
    wanted = list(names)
    needed = set(wanted)
    tensors: dict[str, Any] = {}
    problems: list[Problem] = []
    for shard, data, intact in _read_all(shards):
        if not intact:
            problems.append(
                Problem(
                    "damaged: its md5 sum is not the one in tensor-cache.json",
                    str(shard.path),
                    "copy the file again, or run `mlcawq convert-weight` again",
                )
            )
        if problems:
            continue
        for record in shard.tensors:
            if record.name in needed:
                array = as_array(data[record.offset : record.offset + record.nbytes], record)
                tensors[record.name] = tvm.runtime.tensor(array, device=device)
        device.sync()  # copies to a GPU may hold the shard's bytes until they are done
    raise_all(problems)
    return [tensors[name] for name in wanted]


def as_array(data: np.ndarray, record: TensorRecord) -> np.ndarray:
    """The bytes of one tensor (uint8) as an array of its shape and type."""
    if record.format == "f32-to-bf16" and record.dtype == "float32":
        halves: np.ndarray = data.view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(record.shape)
    dtype = ml_dtypes.bfloat16 if record.dtype == "bfloat16" else np.dtype(record.dtype)
    return data.view(dtype).reshape(record.shape)


def _read_all(shards: Sequence[Shard]) -> Iterator[tuple[Shard, np.ndarray, bool]]:
    """Shards in order with their bytes; a few are read and hashed ahead in other threads."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending: list[tuple[Shard, Future[tuple[np.ndarray, bool]]]] = []
        for i in range(len(shards) + _AHEAD):
            if i < len(shards):
                pending.append((shards[i], pool.submit(_read, shards[i])))
            if pending and (i >= _AHEAD or i >= len(shards)):
                shard, future = pending.pop(0)
                yield (shard, *future.result())


def _read(shard: Shard) -> tuple[np.ndarray, bool]:
    data = np.fromfile(shard.path, np.uint8)
    if data.size != shard.nbytes:  # changed since the folder was checked
        return data, False
    if shard.md5 is None:
        return data, True
    return data, hashlib.md5(data, usedforsecurity=False).hexdigest() == shard.md5
