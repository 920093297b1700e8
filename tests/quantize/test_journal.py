"""A kill between any two steps on the disk leaves a journal that can be trusted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from mlcawq.errors import UserError
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.states import HiddenStates

PRINT = {"model": "a", "recipe": {"bits": 4}}


class _Killed(BaseException):
    pass


def _states(value: float = 0.0) -> HiddenStates:
    states = HiddenStates([(1, 2)], 3, torch.device("cpu"))
    states[0] = torch.full((1, 2, 3), value)
    return states


def _commit(journal: Journal) -> None:
    i = journal.finished
    journal.commit({"w": torch.full((4,), i)}, {"h": _states(i)}, {"block": i})


def _is_whole(out: Path) -> int:
    """How many blocks an untouched journal says are finished, after checking each."""
    with Journal(out, PRINT) as journal:
        for i in range(journal.finished):
            assert journal.block_tensors(i)["w"].tolist() == [i] * 4
            assert journal.reports[i] == {"block": i}
        if journal.finished:
            states = _states()
            journal.load({"h": states})
            assert (states[0] == journal.finished - 1).all()
        return journal.finished


def test_goes_on_after_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for expected in range(3):
        assert _is_whole(out) == expected
        with Journal(out, PRINT) as journal:
            _commit(journal)
    with Journal(out, PRINT) as journal:
        journal.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    out = tmp_path / "out"
    with Journal(out, PRINT) as journal:
        _commit(journal)
    calls = 0

    def dying(real):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise _Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for target, name in ((os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(target, name, dying(getattr(target, name)))
        try:
            with Journal(out, PRINT) as journal:
                _commit(journal)
        except _Killed:
            pass
    assert _is_whole(out) in (1, 2)


def test_other_work_is_refused_and_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", PRINT) as journal:
        _commit(journal)
    other = {**PRINT, "recipe": {"bits": 3}}
    with pytest.raises(UserError, match="another recipe"), Journal(tmp_path / "out", other):
        pass
    with Journal(tmp_path / "out", other, restart=True) as journal:
        assert journal.finished == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"blocks": []}'])
def test_a_damaged_journal_is_said(tmp_path: Path, content: str) -> None:
    with Journal(tmp_path / "out", PRINT) as journal:
        _commit(journal)
        (journal.folder / "journal.json").write_text(content)
    with pytest.raises(UserError, match="--restart"), Journal(tmp_path / "out", PRINT):
        pass
    with Journal(tmp_path / "out", PRINT, restart=True) as journal:
        assert journal.finished == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out", PRINT),
        pytest.raises(UserError, match="another quantization"),
        Journal(tmp_path / "out", PRINT),
    ):
        pass


def test_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path / "out", PRINT) as journal:
        _commit(journal)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            with pytest.raises(UserError, match="disk is full"):
                _commit(journal)
        _commit(journal)
    assert _is_whole(tmp_path / "out") == 2
