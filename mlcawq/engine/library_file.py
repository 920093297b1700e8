"""Compiled libraries as files: what an ELF file tells without being loaded.

Follows the generic ABI (System V Application Binary Interface, chapters 4 and 5), for 64 bits and
little-endian. Other formats are left to the system's loader, and nothing is said of them here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEADER, _SECTION = 64, 64
_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 258: "loongarch64", 21: "ppc64le"}


@dataclass(frozen=True)
class _Header:
    machine: int
    offset: int  # of the table of sections
    count: int
    names: int  # the section with the sections' names


def is_cut_short(library: Path) -> bool:
    """Does an ELF file end before its section headers do, which linkers write last?

    The system's loader would map such a file and die of it (SIGBUS) instead of saying so.
    """
    with library.open("rb") as stream:
        header = _header(stream)
    if header is None:
        return False  # whatever it is, the loader tells
    return library.stat().st_size < header.offset + _SECTION * header.count


def machine_of(library: Path) -> str | None:
    """The architecture that a library has code for; None for a file that is not ELF."""
    with library.open("rb") as stream:
        header = _header(stream)
    if header is None:
        return None
    return _MACHINES.get(header.machine, f"ELF machine {header.machine}")


def section_of(library: Path, name: str) -> bytes | None:
    """What a section holds; None where there is none of that name."""
    with library.open("rb") as stream:
        header = _header(stream)
        if header is None:
            return None
        stream.seek(header.offset)
        table = stream.read(_SECTION * header.count)
        # name, and where the content lies: sh_name, sh_offset, sh_size
        sections = [
            struct.unpack_from("<I20xQQ", table, start)
            for start in range(0, len(table) - _SECTION + 1, _SECTION)
        ]
        if header.names >= len(sections):
            return None
        names = _content(stream, *sections[header.names][1:])
        for start, offset, size in sections:
            if names[start : start + len(name) + 1] == name.encode() + b"\0":
                return _content(stream, offset, size)
    return None


def _content(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _header(stream: BinaryIO) -> _Header | None:
    head = stream.read(_HEADER)
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < _HEADER:
        return None
    (machine,) = struct.unpack_from("<H", head, 0x12)
    (offset,) = struct.unpack_from("<Q", head, 0x28)
    count, names = struct.unpack_from("<HH", head, 0x3C)
    return _Header(machine, offset, count, names)
