"""A folder appears whole or not at all; shards read back by others' code."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlcawq.checkpoint import writing
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import (
    ShardWriter,
    check_output,
    staged_folder,
    write_file,
)
from mlcawq.errors import UserError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_stage_becomes_the_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "deep" / "out") as stage:
        (stage / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "content"
    assert leftovers(tmp_path / "deep") == ["out"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_FRESH_SECONDS", 0.0)
    begin = "from mlcawq.checkpoint.writing import staged_folder\nfrom pathlib import Path\n"
    begin += f"with staged_folder(Path({str(tmp_path / 'out')!r})) as stage:\n"
    begin += "    (stage / 'half').touch()\n    print(stage, flush=True)\n    input()\n"
    command = [sys.executable, "-c", begin]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        stage = Path(writer.stdout.readline().strip())
        with staged_folder(tmp_path / "other"):
            pass
        with pytest.raises(RuntimeError), staged_folder(tmp_path / "out"):
            raise RuntimeError
        assert (stage / "half").exists(), "its process is at work"
        writer.kill()
    assert (stage / "half").exists()
    with staged_folder(tmp_path / "out"):
        assert not stage.exists()
    assert leftovers(tmp_path) == ["other", "out"]


def test_a_path_that_ends_in_dots_is_taken_as_meant(tmp_path: Path) -> None:
    (tmp_path / "out" / "deeper").mkdir(parents=True)
    with staged_folder(tmp_path / "out" / "deeper" / "..", overwrite=True) as stage:
        (stage / "file").touch()
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("reason", [ValueError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, reason: BaseException) -> None:
    with pytest.raises(type(reason)), staged_folder(tmp_path / "out") as stage:
        (stage / "half").write_text("content")
        raise reason
    assert leftovers(tmp_path) == []


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(out, overwrite=True) as stage:
        (stage / "new").write_text("new")
        raise RuntimeError
    assert leftovers(out) == ["old"]
    with staged_folder(out, overwrite=True) as stage:
        (stage / "new").write_text("new")
    assert leftovers(out) == ["new"]
    assert leftovers(tmp_path) == ["out"]


def test_a_full_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        check_output(tmp_path)
    check_output(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file")


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as stage:
        (stage / "file").touch()
    assert leftovers(tmp_path / "out") == ["file"]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_under_a_shard_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors makes an error of its own of the system's."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="disk is full"), staged_folder(tmp_path / "out") as stage:
        writer = ShardWriter(stage)
        writer.add("x", torch.zeros(1000))
        writer.close()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_an_interrupt_while_replacing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Before or after either of the two renames."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, calls = Path.rename, iter(range(1, 100))

    def interrupted(path: Path, target: Path) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        moved = rename(path, target)
        if next(calls) == moment:
            raise KeyboardInterrupt
        return moved

    with (
        pytest.raises(KeyboardInterrupt),
        monkeypatch.context() as patch,
        staged_folder(out, overwrite=True) as stage,
    ):
        (stage / "new").write_text("new")
        patch.setattr(Path, "rename", interrupted)
    assert leftovers(out) == (["new"] if moment == 4 else ["old"])
    assert leftovers(tmp_path) == ["out"]


def test_where_no_folder_can_be_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before hours of work, not when they are over."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out, message in (
        (tmp_path / "file" / "deep" / "out", "is a file"),
        (tmp_path / "dangling", "in the way"),
        (Path("/"), "mounted"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(out, overwrite=True)

    # An empty folder that may be written to, in one that may not.
    out = tmp_path / "closed" / "out"
    out.mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != out.parent)
    with pytest.raises(UserError, match="no permission"):
        check_output(out)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_text() == "two"
    assert leftovers(tmp_path) == ["file"]


@pytest.mark.parametrize("limit", [1, 300, 10_000])
def test_shards_read_back(tmp_path: Path, limit: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(5 + i, 9, generator=generator) for i in range(6)}
    tensors["half"] = torch.randn(4, 4, generator=generator).to(torch.bfloat16)
    writer = ShardWriter(tmp_path, max_shard_bytes=limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.add("numpy", np.arange(6, dtype=np.int32).reshape(2, 3))
    paths = writer.close()
    assert len(paths) == {1: 8, 300: 7, 10_000: 1}[limit]
    reader = TensorReader(tmp_path)
    assert reader.names == sorted([*tensors, "numpy"])
    for name, tensor in tensors.items():
        assert torch.equal(reader.torch(name), tensor)
        assert torch.equal(load_file(reader.info(name).file)[name], tensor)
    assert not list(tmp_path.glob("*.partial"))


def test_equal_calls_give_equal_bytes(tmp_path: Path) -> None:
    digests = []
    for attempt in ("one", "two"):
        folder = tmp_path / attempt
        folder.mkdir()
        writer = ShardWriter(folder, max_shard_bytes=100)
        for i in range(5):
            writer.add(f"t{i}", torch.full((10,), float(i)))
        writer.close()
        files = sorted(folder.iterdir())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]
