"""What is finished of a quantization, kept on disk so that a killed run goes on from there.

A folder beside the output holds, for every finished block, its tensors as they will be written,
and the hidden states that the next block starts from. journal.json, replaced in one step after its
files are on the disk, says how far it got: whatever is not in it does not count. Of several
processes (distributed.py) the first alone has files; the others see what it sees.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file

from mlcawq.checkpoint.writing import is_disk_full, write_json
from mlcawq.errors import UserError
from mlcawq.quantize import distributed
from mlcawq.quantize.states import HiddenStates

_JOURNAL = "journal.json"
_LOCK = "lock"
_STATE = "state-{:05d}"
_ROWS = ".f32"


class Journal:
    """The work folder of one output; a context manager that holds it against other processes.

    fingerprint: what the work depends on, by topic ("model", "recipe", …). A journal with another
        fingerprint is refused, or discarded with `restart`.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, restart: bool = False) -> None:
        self.out = Path(out).absolute()
        self.folder = self.out.parent / f".{self.out.name}.mlcawq-work"
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._restart = restart
        self._reports: list[dict[str, Any]] = []
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> int:
        """Number of blocks that are done."""
        return len(self._reports)

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What `commit` was given of every finished block."""
        return list(self._reports)

    def __enter__(self) -> Journal:
        self._reports = distributed.on_first(self._held)
        return self

    def _held(self) -> list[dict[str, Any]]:
        """Take the folder; what is finished in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError.one(
                "another quantization is writing to this output",
                str(self.out),
                "wait for it, or choose another -o",
            ) from None
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self._reports

    def __exit__(self, *_: object) -> None:
        if self._lock is None:  # not the first process
            with contextlib.suppress(OSError):  # on another machine the folder may be our own
                self.folder.rmdir()
            return
        if not self._reports and self.folder.exists() and not (self.folder / _JOURNAL).exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing worth keeping
        self._lock.close()

    def _open(self) -> None:
        path = self.folder / _JOURNAL
        if self._restart:
            path.unlink(missing_ok=True)
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                earlier, blocks = dict(content["fingerprint"]), list(content["blocks"])
            except (ValueError, KeyError, TypeError):
                raise UserError.one(
                    "what an unfinished quantization left here is damaged",
                    str(path),
                    "pass --restart to discard it",
                ) from None
            differing = [
                topic
                for topic in sorted({*earlier, *self._fingerprint})
                if earlier.get(topic) != self._fingerprint.get(topic)
            ]
            if differing:
                raise UserError.one(
                    f"an unfinished quantization to this output had another {', '.join(differing)}",
                    str(self.folder),
                    "pass --restart to discard it, or run it again as it was",
                )
            self._reports = blocks
        wanted = {_LOCK, _JOURNAL} | {self.block_file(i).name for i in range(self.finished)}
        state = f"{_STATE.format(self.finished)}." if self.finished else _LOCK
        for leftover in self.folder.iterdir():
            if leftover.name not in wanted and not (
                leftover.name.startswith(state) and leftover.suffix == _ROWS
            ):
                leftover.unlink()

    def block_file(self, i: int) -> Path:
        """The safetensors file of finished block i."""
        return self.folder / f"block-{i:05d}.safetensors"

    def _state(self, finished: int, name: str) -> Path:
        return self.folder / f"{_STATE.format(finished)}.{name}{_ROWS}"

    def block_tensors(self, i: int) -> dict[str, torch.Tensor]:
        """The tensors that block i was committed with."""
        return load_file(self.block_file(i))

    def load(self, states: Mapping[str, HiddenStates]) -> None:
        """Fill in the states after the last finished block. Only when `finished` is not 0.

        Raises UserError where they are not what was saved.
        """
        for name, target in states.items():
            target.load(self._state(self.finished, name))

    def commit(
        self,
        tensors: Mapping[str, torch.Tensor],
        states: Mapping[str, HiddenStates],
        report: dict[str, Any],
    ) -> None:
        """Make the next block finished. A kill at any moment leaves it finished or not begun.

        Raises UserError when the disk is full; what was finished before stays so.
        """
        i = self.finished
        reports = [*self._reports, report]
        try:
            if distributed.is_first():
                _save(tensors, self.block_file(i))
            for name, rows in states.items():
                rows.save(self._state(i + 1, name))
            if distributed.is_first():
                write_json(
                    self.folder / _JOURNAL, {"fingerprint": self._fingerprint, "blocks": reports}
                )
        except Exception as error:
            if is_disk_full(error):
                raise UserError.one(
                    f"the disk is full; {i} finished blocks are kept",
                    str(self.folder),
                    "free some space and run the same command again",
                ) from error
            raise
        self._reports = reports
        if distributed.is_first():
            for name in states:
                self._state(i, name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the work folder: the output is complete."""
        self._reports = []
        if not distributed.is_first():
            return
        # The journal goes first: without it the rest does not count.
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
