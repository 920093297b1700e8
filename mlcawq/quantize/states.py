"""Hidden states of all the text between two blocks, in memory or on the disk.

One row a token, in one order whatever they are computed by: the size of a batch, the number of
processes and the place may all differ when an interrupted quantization goes on.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from mlcawq.errors import UserError
from mlcawq.quantize import distributed

SPILL = ".spill"  # ends the names of files that nobody needs once their process has ended


class HiddenStates(Sequence[torch.Tensor]):
    """Float32 [B, T, hidden_size] of every batch of this rank's text.

    shapes: B and T of the batches. hidden_size: of the model.
    device: where batches are given, and kept where they are kept in memory.
    folder: keep them in a file there; in memory when None. Only the batch that is read or written
        is in memory then, and the file goes with the object.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        hidden_size: int,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self._shapes, self._size = list(shapes), hidden_size
        self._device, self._folder = device, folder
        self._starts = [0, *accumulate(batch * length for batch, length in shapes)]
        self._rows = self._file = None
        if folder is None:
            self._rows = torch.empty(self.tokens, hidden_size, device=device)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, name = tempfile.mkstemp(SPILL, dir=folder)
            self._path = Path(name)
            weakref.finalize(self, _remove, self._file, self._path)
            if distributed.ranks() > 1:  # no name is needed, and none is left by a kill
                self._path.unlink()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """B and T of the batches."""
        return list(self._shapes)

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, j):  # type: ignore[no-untyped-def] # slices are of no use here
        """Batch j: a view of what is in memory, a copy of what is in a file."""
        if not -len(self) <= j < len(self):
            raise IndexError(j)
        j %= len(self)
        return self._between(self._starts[j], self._starts[j + 1]).view(*self._shapes[j], -1)

    def __setitem__(self, j: int, states: torch.Tensor) -> None:
        self._put(self._starts[j], states.reshape(-1, self._size))

    def like(self) -> HiddenStates:
        """Room for as many others."""
        return HiddenStates(self._shapes, self._size, self._device, self._folder)

    def next(self) -> HiddenStates:
        """Where to put what a block makes of these, batch by batch: here, unless in a file.

        What a file holds may be what an interrupted run goes on from.
        """
        return self if self._folder is None else self.like()

    def save(self, path: Path) -> None:
        """All ranks' rows to the file `path` of the first one, in their order. All ranks call it.

        The file appears whole or not at all, and is on the disk afterwards.
        """
        partial = path.with_suffix(".partial")
        if self._file is not None and distributed.ranks() == 1:
            os.fsync(self._file)
            partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # some file systems have no second names
                os.link(self._path, partial)
                partial.replace(path)
                return
        batches = (states.flatten(0, 1).cpu() for states in self)
        if not distributed.is_first():
            for _ in distributed.to_first(batches):
                raise AssertionError("the first rank alone is given the parts")
            return
        try:
            with partial.open("wb") as stream:
                for rows in distributed.to_first(batches):
                    stream.write(memoryview(_bytes(rows)))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Our rows of what `save` has written. All ranks call it.

        Raises UserError where the file holds another number of rows.
        """
        first = distributed.before(self.tokens)
        done = 0

        tokens = int(distributed.total(self.tokens))
        expected = tokens * self._size * torch.float32.itemsize

        def check() -> None:
            if path.stat().st_size != expected:
                raise UserError.one(
                    "what an unfinished quantization left here is damaged",
                    str(path),
                    "pass --restart to discard it",
                )

        distributed.on_first(check)
        file = os.open(path, os.O_RDONLY) if distributed.is_first() else -1
        try:
            while done < tokens:
                count = min(_PIECE, tokens - done)
                rows = torch.empty(count, self._size, device="cpu")
                if file >= 0:
                    _read(file, rows, done * self._size * rows.element_size())
                distributed.from_first(rows)
                start, stop = max(done, first), min(done + count, first + self.tokens)
                if start < stop:
                    self._put(start - first, rows[start - done : stop - done])
                done += count
        finally:
            if file >= 0:
                os.close(file)

    def _between(self, start: int, stop: int) -> torch.Tensor:
        if self._file is None:
            assert self._rows is not None
            return self._rows[start:stop]
        rows = torch.empty(stop - start, self._size, device="cpu")
        _read(self._file, rows, start * self._size * rows.element_size())
        return rows.to(self._device)

    def _put(self, start: int, rows: torch.Tensor) -> None:
        if self._file is None:
            assert self._rows is not None
            self._rows[start : start + len(rows)] = rows
        else:
            content = _bytes(rows.float().cpu())
            offset = start * self._size * torch.float32.itemsize
            while len(content):
                written = os.pwrite(self._file, content, offset)
                content, offset = content[written:], offset + written


_PIECE = 4096  # rows that are read at a time to go on


def blank_like(states: Sequence[torch.Tensor]) -> HiddenStates | list[torch.Tensor]:
    """Something to put as many tensors into by index."""
    return states.like() if isinstance(states, HiddenStates) else [torch.empty(0)] * len(states)


def shapes_of(batches: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """B and T of tensors [B, T, ...] each."""
    if isinstance(batches, HiddenStates):
        return batches.shapes
    return [(tensor.shape[0], tensor.shape[1]) for tensor in batches]


def _bytes(rows: torch.Tensor) -> memoryview:
    return memoryview(rows.contiguous().view(torch.uint8).numpy()).cast("B")


def _read(file: int, rows: torch.Tensor, offset: int) -> None:
    content = _bytes(rows)
    while len(content):
        count = os.preadv(file, [content], offset)
        if not count:
            raise OSError("hidden states end early")
        content, offset = content[count:], offset + count


def _remove(file: int, path: Path) -> None:
    os.close(file)
    path.unlink(missing_ok=True)
