"""Which of several GPUs a library runs on, and what is said when none does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlcawq.engine import devices
from mlcawq.engine.artifact import BuiltFolder
from mlcawq.engine.conversation import Conversation
from mlcawq.engine.devices import Device, Missing, fitting_device
from mlcawq.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """A machine with an sm_75, an sm_86 and an sm_90."""
    found = [
        Device("cuda", i, SimpleNamespace(compute_version=version))
        for i, version in enumerate(("7.5", "8.6", "9.0"))
    ]

    def find(kind: str, index: int = 0) -> Device | Missing:
        return found[index] if index < len(found) else Missing("no more", "")

    monkeypatch.setattr(devices, "find_device", find)
    return found


def chosen(first: Device, arch: str | None, asked: str) -> int:
    conversation = Conversation(name="LM", roles={"user": "", "assistant": ""}, seps=[""])
    built = BuiltFolder(Path("model"), {}, conversation, (), {"cuda": Path("lib-cuda.so")})
    metadata: dict[str, Any] = {} if arch is None else {"target": {"kind": "cuda", "arch": arch}}
    return fitting_device(built, first, asked, metadata).index


@pytest.mark.parametrize(
    ("arch", "index"), [("sm_75", 0), ("sm_80", 1), ("sm_86", 1), ("sm_90a", 2), (None, 0)]
)
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_the_first_gpu_that_runs_the_library(
    gpus: list[Device], arch: str | None, index: int, asked: str
) -> None:
    assert chosen(gpus[0], arch, asked) == index


def test_a_gpu_that_is_named_is_not_exchanged(gpus: list[Device]) -> None:
    assert chosen(gpus[1], "sm_86", "cuda:1") == 1
    with pytest.raises(UserError, match=r"cuda:1: it was compiled for sm_90a.*sm_86") as error:
        chosen(gpus[1], "sm_90a", "cuda:1")
    assert "mlcawq compile model --target cuda:sm_86" in str(error.value)


def test_no_gpu_that_runs_the_library(gpus: list[Device]) -> None:
    with pytest.raises(UserError, match=r"compiled for sm_89, and cuda:0 is sm_75") as error:
        chosen(gpus[0], "sm_89", "auto")
    assert "--target cuda:sm_75" in str(error.value)
