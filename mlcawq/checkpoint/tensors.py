"""Reading tensors one at a time from the safetensors files of a checkpoint folder."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from mlcawq.checkpoint.config import load_json
from mlcawq.errors import Problem, UserError, raise_all

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# safetensors' names of the element types that checkpoints use.
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor. dtype: safetensors' name; offset, nbytes: bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class TensorReader:
    """The tensors of a folder by name, read lazily: opening it reads headers only.

    Raises UserError at construction, naming every shard that is missing, truncated or broken and
    every tensor that the index promises and no shard holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._infos: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        promised = self._promised(problems)
        self._indexed = tuple(promised)
        files = sorted({self.folder / file for file in promised.values()}) or [self._single()]
        for file in files:
            try:
                for info in read_header(file):
                    # Where a folder has an index, it decides which shard a name belongs to.
                    if promised.get(info.name, file.name) == file.name:
                        self._infos[info.name] = info
            except UserError as error:
                problems.extend(error.problems)
        if not problems:
            problems.extend(
                Problem(f"{name} is listed in {INDEX} but {file} does not hold it", str(folder))
                for name, file in promised.items()
                if name not in self._infos
            )
        raise_all(problems)

    def _promised(self, problems: list[Problem]) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        weight_map = load_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError.one("no weight_map in it", str(path), "download the checkpoint again")
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError.one("its weight_map is damaged", str(path), "download it again")
        for file in sorted(set(weight_map.values())):
            # An index is data from elsewhere: it may not point out of its folder.
            if Path(file).name != file:
                raise UserError.one(f"the shard name {file!r} is not a plain file name", str(path))
        return weight_map

    def _single(self) -> Path:
        path = self.folder / SINGLE
        if path.is_file():
            return path
        others = sorted(self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        if others:
            raise UserError.one(
                f"{len(others)} safetensors files and no {INDEX}",
                str(self.folder),
                "download the checkpoint again, with its index",
            )
        raise UserError.one(
            "no safetensors weights",
            str(self.folder),
            f"expected {SINGLE} or {INDEX}",
        )

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._infos)

    @property
    def listed(self) -> list[str]:
        """All tensor names in the order of the index, sorted where there is none."""
        return list(self._indexed) or self.names

    @property
    def total_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.nbytes for info in self._infos.values())

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises UserError when there is none of that name."""
        try:
            return self._infos[name]
        except KeyError:
            raise UserError.one(f"no tensor {name}", str(self.folder)) from None

    def numpy(self, name: str) -> np.ndarray:
        """A tensor as a new array in its stored type (bfloat16 as ml_dtypes.bfloat16)."""
        info = self.info(name)
        count = info.nbytes // np.dtype(_DTYPES[info.dtype]).itemsize
        flat = np.fromfile(info.file, _DTYPES[info.dtype], count, offset=info.offset)
        if flat.size != count:  # the file shrank after its header was checked
            raise UserError.one(f"{name} ends early", str(info.file))
        return flat.reshape(info.shape)

    def torch_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """tensor[rows] of a matrix [R, C], int64 rows [...] -> [..., C]; reads those rows only."""
        info = self.info(name)
        stored = np.memmap(info.file, _DTYPES[info.dtype], "r", info.offset, info.shape)
        return _as_torch(np.asarray(stored[rows.numpy()]))

    def torch(self, name: str) -> torch.Tensor:
        """A tensor as a new torch tensor in its stored type."""
        return _as_torch(self.numpy(name))


def _as_torch(array: np.ndarray) -> torch.Tensor:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, from its header alone.

    The format: 8 bytes of little-endian header length, a JSON header, the data. Raises UserError
    when the file is missing, cut short, or not in that format.
    """
    where = str(file)
    again = "download the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if prefix.startswith(b"version "):
                raise UserError.one(
                    "a Git LFS pointer, not the weights", where, "run `git lfs pull` there"
                )
            if len(prefix) < 8:
                raise UserError.one(f"only {size} bytes long", where, again)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_HEADER_LIMIT, size - 8):
                raise UserError.one("truncated, or not a safetensors file", where, again)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = [
            (name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, offsets))
            for name, entry in header.items()
            for offsets in [(entry["data_offsets"][0], entry["data_offsets"][1])]
        ]
    except FileNotFoundError:
        raise UserError.one("the shard is missing", where, again) from None
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", where) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError.one("its header is damaged", where, again) from None
    infos, end = [], 0
    for name, dtype, shape, start, stop in entries:
        if dtype not in _DTYPES:
            raise UserError.one(f"{name} has the unsupported type {dtype}", where)
        nbytes = prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if min(start, *shape, 0) < 0 or nbytes != stop - start:
            raise UserError.one(f"{name} has {stop - start} bytes for shape {shape}", where, again)
        infos.append(TensorInfo(name, dtype, shape, file, 8 + length + start, nbytes))
        end = max(end, stop)
    if size < 8 + length + end:
        raise UserError.one(
            f"truncated: {size} bytes of {8 + length + end}",
            where,
            again,
        )
    return infos
