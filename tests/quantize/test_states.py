"""Hidden states in memory and in files are the same to their users."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from mlcawq.errors import UserError
from mlcawq.quantize.states import HiddenStates, blank_like, shapes_of

_SHAPES = [(2, 3), (1, 4)]
_CPU = torch.device("cpu")


def _filled(folder: Path | None = None) -> HiddenStates:
    states = HiddenStates(_SHAPES, 5, _CPU, folder)
    for j, shape in enumerate(_SHAPES):
        states[j] = torch.arange(shape[0] * shape[1] * 5.0).view(*shape, 5) + 100 * j
    return states


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_put_in_is_found(tmp_path: Path, on_disk: bool) -> None:
    states = _filled(tmp_path if on_disk else None)
    assert len(states) == 2
    assert states.tokens == 10
    assert [tuple(x.shape) for x in states] == [(2, 3, 5), (1, 4, 5)]
    assert states[1][0, 0, 0] == 100
    assert torch.equal(states[-1], states[1])
    with pytest.raises(IndexError):
        states[2]
    states[0] = torch.zeros(2, 3, 5)
    assert states[0].sum() == 0
    assert states[1].sum() == 2190
    assert shapes_of(blank_like(states)) == _SHAPES
    # What a file holds is kept for a run that is interrupted; memory is used again.
    assert (states.next() is states) != on_disk


def test_files_go_with_their_states(tmp_path: Path) -> None:
    states = _filled(tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 1
    del states
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("saved_on_disk", [False, True])
@pytest.mark.parametrize("read_on_disk", [False, True])
def test_saved_and_read_in_other_batches(
    tmp_path: Path, saved_on_disk: bool, read_on_disk: bool
) -> None:
    states = _filled(tmp_path if saved_on_disk else None)
    states.save(tmp_path / "saved.f32")
    again = HiddenStates([(1, 3), (1, 3), (1, 4)], 5, _CPU, tmp_path if read_on_disk else None)
    again.load(tmp_path / "saved.f32")
    assert torch.equal(torch.cat([again[0], again[1]]), states[0])
    assert torch.equal(again[2], states[1])


def test_a_file_system_without_second_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    states = _filled(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    states.save(tmp_path / "saved.f32")
    again = states.like()
    again.load(tmp_path / "saved.f32")
    assert torch.equal(again[0], states[0])


def test_states_of_other_text_are_refused(tmp_path: Path) -> None:
    _filled().save(tmp_path / "saved.f32")
    with pytest.raises(UserError, match="--restart"):
        HiddenStates([(1, 3)], 5, _CPU).load(tmp_path / "saved.f32")
