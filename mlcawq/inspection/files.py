"""Single weight files: safetensors, GGUF, pickles."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from mlcawq.checkpoint.tensors import read_header
from mlcawq.errors import Problem
from mlcawq.inspection.description import Description, size

_GGUF_MAGIC = b"GGUF"
# GGUF value types -> struct codes; 8 is a string, 9 an array.
_GGUF_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_GGUF_SHOWN = ("general.architecture", "general.name", "general.size_label")
_LONGEST_STRING = 2**24
_MOST_ENTRIES = 10_000


def describe_file(path: Path) -> Description:
    """A file that is not a library: by its first bytes rather than by its name."""
    facts: dict[str, Any] = {"bytes": size(path.stat().st_size)}
    with path.open("rb") as stream:
        start = stream.read(4)
        if start == _GGUF_MAGIC:
            return _gguf(path, stream, facts)
    if path.suffix == ".gguf":
        out = Description(path, "a file named .gguf", facts)
        out.problems.append(Problem("it does not begin as GGUF files do", str(path)))
        return out
    if path.suffix == ".safetensors":
        return _safetensors(path, facts)
    if start[:2] == b"\x80\x02" or _is_torch_zip(path):
        return Description(
            path,
            "a pickle file (PyTorch); it was not opened, since reading one can run code",
            facts,
            next_step="use a safetensors version; mlcawq quantize/build --trust-pickle reads the "
            "tensors of a checkpoint folder without running code",
        )
    return Description(path, "not a model file that is known here", facts)


def _safetensors(path: Path, facts: dict[str, Any]) -> Description:
    out = Description(path, "a safetensors file", facts)
    infos = out.attempt(lambda: read_header(path))
    if infos is not None:
        by_type: Counter[str] = Counter()
        for info in infos:
            by_type[info.dtype] += info.nbytes
        facts["tensors"] = len(infos)
        facts["bytes by type"] = dict(by_type.most_common())
        out.next_step = f"mlcawq inspect {path.parent}"
    return out


def _is_torch_zip(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _gguf(path: Path, stream: BinaryIO, facts: dict[str, Any]) -> Description:
    """Version, counts and a few entries of the header (ggml's gguf.md, versions 2 and 3)."""
    out = Description(
        path,
        "a GGUF file (llama.cpp)",
        facts,
        next_step="mlcawq does not read GGUF: give the Hugging Face checkpoint it was made from",
    )
    try:
        version, tensors, entries = struct.unpack("<IQQ", _exactly(stream, 20))
        facts["version"], facts["tensors"] = version, tensors
        if version < 2:
            return out
        for _ in range(min(entries, _MOST_ENTRIES)):
            key = _string(stream)
            value = _value(stream, _integer(stream, "<I"))
            if key in _GGUF_SHOWN or key.endswith((".context_length", ".block_count")):
                facts[key.rpartition(".")[2].replace("_", " ")] = value
    except (EOFError, struct.error, ValueError, UnicodeDecodeError) as error:
        out.problems.append(Problem(f"the header is damaged ({error})", str(path)))
    return out


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        inner, count = struct.unpack("<IQ", _exactly(stream, 12))
        if inner in _GGUF_SCALARS:
            stream.seek(count * struct.calcsize("<" + _GGUF_SCALARS[inner]), 1)
        elif inner in (_STRING, _ARRAY):
            for _ in range(count):
                _value(stream, inner)
        else:
            raise ValueError(f"array of type {inner}")
        return f"{count} values"
    if kind not in _GGUF_SCALARS:
        raise ValueError(f"value of type {kind}")
    code = "<" + _GGUF_SCALARS[kind]
    return struct.unpack(code, _exactly(stream, struct.calcsize(code)))[0]


def _string(stream: BinaryIO) -> str:
    length = _integer(stream, "<Q")
    if length > _LONGEST_STRING:
        raise ValueError(f"string of {length} bytes")
    return _exactly(stream, length).decode("utf-8")


def _integer(stream: BinaryIO, code: str) -> int:
    return int(struct.unpack(code, _exactly(stream, struct.calcsize(code)))[0])


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("it ends too early")
    return data
