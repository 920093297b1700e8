"""TVM's packed form of a library's imported modules: taken apart, and put together again.

A library carries the modules that are no host code as one block of bytes,

    u64 size of the rest | tree: two lists of u64 | for each module: kind, then its own bytes

where a list or string is its length as u64 and its elements, and the host code itself has the
kind "_lib" and no bytes (TVM 0.26, src/target/codegen.cc: ModuleSerializer). What a module of
device code has for bytes is

    format | functions: list of (name, FunctionInfo) | code

(src/backend/cuda/runtime/cuda_module.cc: SaveToBytes; src/runtime/metadata.h: FunctionInfo).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HOST = "_lib"
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class DeviceCode:
    """Code for a device. format: "cuda" (source), "cubin", …; functions: as TVM wrote them, which
    is kept to the byte; names: of the kernels among them.
    """

    format: str
    functions: bytes
    names: tuple[str, ...]
    code: bytes


@dataclass(frozen=True)
class PackedModules:
    """tree: how modules import each other; modules: (kind, bytes or None for host code)."""

    tree: bytes
    modules: tuple[tuple[str, bytes | None], ...]


def unpack(blob: bytes) -> PackedModules:
    """Raises ValueError for bytes that are not of this form to the last one."""
    reader = _Reader(blob)
    if reader.u64() != len(blob) - _U64.size:
        raise ValueError("the size of the packed modules is not what it says")
    start = reader.at
    rows = reader.u64()
    reader.skip(_U64.size * rows)
    reader.skip(_U64.size * reader.u64())
    tree = blob[start : reader.at]
    modules = []
    for _ in range(rows - 1):
        kind = reader.string().decode()
        modules.append((kind, None if kind == _HOST else reader.string()))
    reader.end()
    return PackedModules(tree, tuple(modules))


def pack(packed: PackedModules) -> bytes:
    """The inverse of `unpack`."""
    body = bytearray(packed.tree)
    for kind, content in packed.modules:
        body += _string(kind.encode())
        if content is not None:
            body += _string(content)
    return _U64.pack(len(body)) + bytes(body)


def unpack_device_code(content: bytes) -> DeviceCode:
    """Raises ValueError for bytes that are not of this form to the last one."""
    reader = _Reader(content)
    format_ = reader.string().decode()
    start, names = reader.at, []
    for _ in range(reader.u64()):
        names.append(reader.string().decode())
        reader.string()  # its name once more
        reader.skip(4 * reader.u64())  # types of its arguments, a DLDataType each
        for _ in range(reader.u64()):
            reader.string()  # what it is launched with: blockIdx.x, …
        reader.skip(4 * reader.u64())  # which arguments are tensor maps, an int32 each
    functions = content[start : reader.at]
    code = reader.string()
    reader.end()
    return DeviceCode(format_, functions, tuple(names), code)


def pack_device_code(code: DeviceCode) -> bytes:
    """The inverse of `unpack_device_code`."""
    return _string(code.format.encode()) + code.functions + _string(code.code)


def _string(content: bytes) -> bytes:
    return _U64.pack(len(content)) + content


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def u64(self) -> int:
        self.skip(_U64.size)
        return int(_U64.unpack_from(self._content, self.at - _U64.size)[0])

    def string(self) -> bytes:
        size = self.u64()
        self.skip(size)
        return self._content[self.at - size : self.at]

    def skip(self, size: int) -> None:
        if self.at + size > len(self._content):
            raise ValueError("packed modules end early")
        self.at += size

    def end(self) -> None:
        if self.at != len(self._content):
            raise ValueError("packed modules have bytes left over")
