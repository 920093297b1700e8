"""The order in which parameters are read, converted and stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mlcawq.checkpoint.tensors import TensorReader


def loading_order(sources: Mapping[str, Sequence[str]], reader: TensorReader) -> list[str]:
    """The parameters (keys of `sources`) in the order in which their tensors are listed.

    The order of mlc_llm: file by file as the checkpoint's index first names them, and in a file
    tensor by tensor; a fused parameter comes with the first of its parts. It reads every file from
    one end to the other, and folders of both programs get the same bytes. A parameter without
    tensors follows the one before it in `sources`.
    """
    readers: dict[str, list[str]] = {}
    attached: dict[str, list[str]] = {}
    previous = ""
    for parameter, names in sources.items():
        if not names:
            attached.setdefault(previous, []).append(parameter)
            continue
        previous = parameter
        for name in names:
            readers.setdefault(name, []).append(parameter)
    order: dict[str, None] = dict.fromkeys(attached.get("", []))
    for name in _by_file(reader):
        for parameter in readers.get(name, []):
            order.update(dict.fromkeys([parameter, *attached.get(parameter, [])]))
    return list(order)


def _by_file(reader: TensorReader) -> Iterable[str]:
    files: dict[object, list[str]] = {}
    for name in reader.listed:
        files.setdefault(reader.info(name).file, []).append(name)
    return (name for names in files.values() for name in names)
