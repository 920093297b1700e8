"""Puts the weights of params_shard_*.bin where kernels read them.

On a CPU they are not copied into tensors: tensors are views (through DLPack) of the mapped files,
or of one buffer in huge pages that the files are read into. The bytes are the same either way; see
`mlcawq.engine.memory` for what each costs. Other devices get copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import tvm

from mlcawq.cgroup import available_memory
from mlcawq.engine.artifact import Shard, TensorRecord
from mlcawq.engine.memory import (
    MappedFile,
    Reading,
    has_huge_pages,
    in_background,
    new_buffer,
    read_all,
)
from mlcawq.engine.shard_checks import check_shards
from mlcawq.errors import UserError, raise_all

Placement = Literal["auto", "mapped", "resident"]
_Files = Sequence[tuple[Shard, MappedFile]]
ALIGNMENT = 64  # bytes, of all tensors that compiled kernels are handed

# Available memory in units of the weights' bytes: for their copy, and as much for the KV cache and
# for the page cache, from which the next start reads them.
_PLENTY = 2


def check_placement(asked: str) -> Placement:
    """Raises UserError for a word that is none of the three."""
    for known in get_args(Placement):
        if asked == known:
            return known  # type: ignore[no-any-return]
    raise UserError.one(
        f"unknown placement of weights {asked!r}",
        "--weights",
        f"use one of: {', '.join(get_args(Placement))}",
    )


def choose_placement(asked: Placement, nbytes: int) -> Literal["mapped", "resident"]:
    """Where `nbytes` of weights for a CPU go. auto: resident where that gives huge pages and
    leaves as much memory again as the weights take, mapped otherwise.
    """
    if asked != "auto":
        return asked
    plenty = has_huge_pages() and available_memory() >= _PLENTY * nbytes
    return "resident" if plenty else "mapped"


@dataclass
class Weights:
    """tensors: on the device, in the order of the names that were given.

    move: begins to read the same ones into huge pages, where that is worth it; until they are
    there the mapped ones serve.
    """

    tensors: list[Any]
    move: Callable[[], Future[list[Any]]] | None = None


def load_weights(
    shards: Sequence[Shard],
    names: Iterable[str],
    device: Any,
    placement: Placement = "mapped",
    threads: int = 2,
) -> Weights:
    """The named tensors on `device`.

    placement: on a CPU; with "auto", where they are to be resident, they are mapped first and
    can be moved later. threads: that read. Raises UserError naming every shard whose
    bytes are not those that were written, MemoryError where there is no room.
    """
    wanted = list(names)
    needed = set(wanted)
    raise_all(check_shards(shards, threads))
    if device.type != "cpu":
        tensors = _copied(shards, needed, device)
        return Weights([tensors[name] for name in wanted])
    files = [(shard, MappedFile(shard.path)) for shard in shards]
    if placement == "resident":
        tensors = _resident(files, needed, threads)
        return Weights([tensors[name] for name in wanted])
    tensors = _mapped(files, needed)
    weights = Weights([tensors[name] for name in wanted])
    nbytes = sum(shard.nbytes for shard in shards)
    if choose_placement(placement, nbytes) == "resident":

        def moved() -> list[Any]:
            tensors = _resident(files, needed, threads=1)
            return [tensors[name] for name in wanted]

        weights.move = partial(in_background, moved)
    return weights


def as_array(data: np.ndarray, record: TensorRecord) -> np.ndarray:
    """The bytes of one tensor (uint8) as an array of its shape and type."""
    if not _is_raw(record):
        halves: np.ndarray = data.view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(record.shape)
    dtype = ml_dtypes.bfloat16 if record.dtype == "bfloat16" else np.dtype(record.dtype)
    return data.view(dtype).reshape(record.shape)


def _is_raw(record: TensorRecord) -> bool:
    return record.format != "f32-to-bf16" or record.dtype != "float32"


def _bytes_of(data: np.ndarray, record: TensorRecord) -> np.ndarray:
    return data[record.offset : record.offset + record.nbytes]


def _view(data: np.ndarray, record: TensorRecord) -> Any:
    """A tensor that is these bytes, without a copy. They go through DLPack as bytes, since numpy
    does not hand on bfloat16, and one by one, since kernels refuse tensors with an offset.
    """
    return tvm.runtime.from_dlpack(data)._create_view(record.shape, record.dtype)


def _copied(shards: Sequence[Shard], needed: set[str], device: Any) -> dict[str, Any]:
    tensors = {}
    for shard in shards:
        data = MappedFile(shard.path).data
        for record in shard.tensors:
            if record.name in needed:
                array = as_array(_bytes_of(data, record), record)
                tensors[record.name] = tvm.runtime.tensor(array, device=device)
        device.sync()  # copies to a GPU may read the mapping until they are done
    return tensors


def _mapped(files: _Files, needed: set[str]) -> dict[str, Any]:
    """Views of the files; copies of tensors that begin elsewhere than kernels may assume, as they
    do in folders of mlc_llm, or that are stored in another type.
    """
    tensors = {}
    for shard, file in files:
        for record in shard.tensors:
            if record.name not in needed:
                continue
            data = _bytes_of(file.data, record)
            if _is_raw(record) and record.offset % ALIGNMENT == 0:
                tensors[record.name] = _view(data, record)
            else:
                tensors[record.name] = tvm.runtime.tensor(as_array(data, record))
    return tensors


def _resident(files: _Files, needed: set[str], threads: int) -> dict[str, Any]:
    """Views of one buffer, in the order of the files. Where a tensor is stored in another type it
    is a copy.
    """
    tensors, places, end = {}, [], 0
    for shard, file in files:
        for record in shard.tensors:
            if record.name not in needed:
                continue
            if _is_raw(record):
                places.append((file, record, end))
                end += -(-record.nbytes // ALIGNMENT) * ALIGNMENT
            else:
                array = as_array(_bytes_of(file.data, record), record)
                tensors[record.name] = tvm.runtime.tensor(array)
    buffer = new_buffer(end)
    parts = [buffer[start : start + record.nbytes] for _, record, start in places]
    read_all(
        [
            Reading(file, record.offset, part)
            for (file, record, _), part in zip(places, parts, strict=True)
        ],
        threads,
    )
    for (_, record, _), part in zip(places, parts, strict=True):
        tensors[record.name] = _view(part, record)
    return tensors
