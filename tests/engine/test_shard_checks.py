"""md5 sums are computed once for a file that stays as it is, and again for any that does not."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mlcawq.engine import shard_checks
from mlcawq.engine.artifact import Shard
from mlcawq.engine.shard_checks import check_shards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and files that are settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_checks, "_SETTLED", -1.0)
    return tmp_path / "cache" / "mlcawq" / "checked_weights.json"


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose sums are computed."""
    names: list[str] = []
    compute = shard_checks._intact

    def noted(shard: Shard) -> object:
        names.append(shard.path.name)
        return compute(shard)

    monkeypatch.setattr(shard_checks, "_intact", noted)
    return names


def make_shards(folder: Path, count: int = 3) -> list[Shard]:
    rng = np.random.default_rng()
    shards = []
    for i in range(count):
        path = folder / f"params_shard_{i}.bin"
        data = rng.bytes(3000 + i)
        path.write_bytes(data)
        shards.append(Shard(path, len(data), hashlib.md5(data).hexdigest(), ()))
    return shards


def test_once_a_file(tmp_path: Path, summed: list[str]) -> None:
    shards = make_shards(tmp_path)
    assert check_shards(shards, 2) == []
    assert sorted(summed) == [shard.path.name for shard in shards]
    summed.clear()
    assert check_shards(shards, 2) == []
    assert summed == []
    assert check_shards(shards, 2, everything=True) == []
    assert len(summed) == 3


def test_a_changed_file_is_found(tmp_path: Path, summed: list[str]) -> None:
    shards = make_shards(tmp_path)
    check_shards(shards, 1)
    summed.clear()
    path = shards[1].path
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    (problem,) = check_shards(shards, 1)
    assert problem.where == str(path)
    assert "md5" in problem.what
    assert summed == [path.name]
    assert check_shards(shards, 1) == [problem]  # what is damaged is never remembered


def test_a_file_put_in_its_place_is_found(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    check_shards(shards, 1)
    before = shards[0].path.stat()
    other = tmp_path / "other"
    other.write_bytes(bytes(shards[0].nbytes))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(shards[0].path)
    assert [problem.where for problem in check_shards(shards, 1)] == [str(shards[0].path)]


def test_another_sum_for_the_same_file(tmp_path: Path) -> None:
    (shard,) = make_shards(tmp_path, 1)
    check_shards([shard], 1)
    assert len(check_shards([Shard(shard.path, shard.nbytes, "0" * 32, ())], 1)) == 1


def test_all_damaged_files_at_once(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    for shard in shards[1:]:
        shard.path.write_bytes(bytes(shard.nbytes))
    assert [p.where for p in check_shards(shards, 2)] == [str(s.path) for s in shards[1:]]


def test_files_without_sums_are_believed(tmp_path: Path, summed: list[str]) -> None:
    shards = [Shard(shard.path, shard.nbytes, None, ()) for shard in make_shards(tmp_path)]
    assert check_shards(shards, 1) == []
    assert summed == []


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, summed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_checks, "_SETTLED", 3600.0)
    (shard,) = make_shards(tmp_path, 1)
    check_shards([shard], 1)
    check_shards([shard], 1)
    assert len(summed) == 2
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 7200)
    check_shards([shard], 1)
    check_shards([shard], 1)
    assert len(summed) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}'])
def test_a_memory_that_is_none(
    tmp_path: Path, cache: Path, summed: list[str], content: str
) -> None:
    shards = make_shards(tmp_path)
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    for _ in range(2):
        assert check_shards(shards, 1) == []
    assert len(summed) == 3


def test_a_memory_that_cannot_be_written(tmp_path: Path, cache: Path, summed: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    shards = make_shards(tmp_path)
    for _ in range(2):
        assert check_shards(shards, 1) == []
    assert len(summed) == 6


def test_files_that_are_gone_are_forgotten(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = make_shards(tmp_path / "old"), make_shards(tmp_path / "new")
    check_shards(old, 1)
    for shard in old[1:]:
        shard.path.unlink()
    check_shards(new, 1)
    remembered = set(json.loads(cache.read_text()))
    assert remembered == {str(shard.path.resolve()) for shard in [old[0], *new]}
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
