"""All weights of a model in one safetensors file, written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mlcawq.checkpoint.tensors import SINGLE

if TYPE_CHECKING:
    import torch

# Of the header, for a tensor: longer than any name and its shape and place take.
_HEADER_BYTES = 512
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class SingleFileWriter:
    """model.safetensors, for readers that take no shards; holds one tensor at a time.

    The header stands before the tensors and says where each is, so that room is left for it, as
    the format allows: spaces after the JSON. Takes at most `count` tensors, in an order in which
    each begins at a whole element of its type. Used as `ShardWriter`.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._path = Path(folder) / SINGLE
        self._room = max(1, count) * _HEADER_BYTES  # a multiple of 8, as tensors are aligned
        self._stream = self._path.open("wb")
        self._stream.seek(8 + self._room)
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._end = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to the disk."""
        import torch

        tensor = tensor.detach().contiguous().cpu()
        begin, self._end = self._end, self._end + tensor.nbytes
        if begin % tensor.itemsize:  # no byte may be left out between two tensors
            raise ValueError(f"{name} would begin within an element")
        self._header[name] = {
            "dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self._end],
        }
        self._stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

    def close(self) -> list[Path]:
        """Write the header; returns the path of the file, in a list."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        if len(header) > self._room:
            raise ValueError("more tensors than were announced")
        self._stream.seek(0)
        self._stream.write(len(header).to_bytes(8, "little") + header)
        self._stream.close()
        return [self._path]
