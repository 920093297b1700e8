"""Weights where they are: views of mapped files or of one buffer, the same bytes either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from mlcawq import cgroup
from mlcawq.engine import memory, weights
from mlcawq.engine.artifact import Shard, TensorRecord
from mlcawq.engine.engine import Engine
from mlcawq.engine.memory import MappedFile, Reading, has_huge_pages, new_buffer, read_all
from mlcawq.engine.sampling import SamplingParams
from mlcawq.engine.weights import check_placement, choose_placement, load_weights
from mlcawq.errors import UserError

CPU = tvm.cpu(0)
PLACEMENTS = ("mapped", "resident")


def make_shard(path: Path, arrays: dict[str, np.ndarray], *, gap: int) -> Shard:
    """Tensors in one file; `gap` bytes before the first, none between them."""
    data, records = bytes(gap), []
    for name, array in arrays.items():
        dtype, stored = str(array.dtype), array
        kind = "raw"
        if name.startswith("halved"):
            kind, stored = "f32-to-bf16", array.astype(ml_dtypes.bfloat16)
        shape = tuple(array.shape)
        records.append(TensorRecord(name, shape, dtype, kind, stored.nbytes, len(data)))
        data += stored.tobytes()
    path.write_bytes(data)
    return Shard(path, len(data), None, tuple(records))


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"a{seed}": rng.integers(0, 2**32, (3, 32), np.uint32),
        f"b{seed}": rng.random((5, 64)).astype(np.float16),
        f"c{seed}": rng.random(32).astype(ml_dtypes.bfloat16),
        f"halved{seed}": rng.random((4, 4)).astype(ml_dtypes.bfloat16).astype(np.float32),
        f"e{seed}": rng.integers(0, 255, (7,), np.uint8),
        f"f{seed}": rng.random((2, 3)).astype(np.float32),
    }


def values(tensor: Any) -> np.ndarray:
    if str(tensor.dtype) != "bfloat16":
        return np.asarray(tensor.numpy())
    return np.asarray(tensor._create_view(tensor.shape, "uint16").numpy()).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("gap", [0, 64, 1, 40])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_type_from_any_place(tmp_path: Path, placement: Any, gap: int) -> None:
    parts = [random_arrays(seed) for seed in range(2)]
    shards = [make_shard(tmp_path / f"{i}.bin", part, gap=gap) for i, part in enumerate(parts)]
    expected = {name: array for part in parts for name, array in part.items() if name != "e0"}
    names = sorted(expected, reverse=True)
    tensors = load_weights(shards, names, CPU, placement, threads=2).tensors
    for name, tensor in zip(names, tensors, strict=True):
        assert (tuple(tensor.shape), str(tensor.dtype)) == (
            expected[name].shape,
            str(expected[name].dtype),
        )
        assert tensor.data_ptr() % 64 == 0
        np.testing.assert_array_equal(values(tensor), expected[name])


def mapped_files() -> list[str]:
    return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]


def test_mapped_tensors_are_the_file(tmp_path: Path) -> None:
    big = {"big": np.arange(2**20, dtype=np.int32)}
    shard = make_shard(tmp_path / "0.bin", big, gap=0)
    (tensor,) = load_weights([shard], ["big"], CPU, "mapped").tensors
    assert str(shard.path) in mapped_files()
    with shard.path.open("r+b") as stream:  # not what users do, but a copy would not see it
        stream.write(np.int32(-5).tobytes())
    assert tensor.numpy()[0] == -5
    del tensor
    assert str(shard.path) not in mapped_files()


def test_resident_tensors_are_not(tmp_path: Path) -> None:
    big = {"big": np.arange(2**20, dtype=np.int32)}
    shard = make_shard(tmp_path / "0.bin", big, gap=64)
    (tensor,) = load_weights([shard], ["big"], CPU, "resident").tensors
    assert str(shard.path) not in mapped_files()
    shard.path.unlink()
    np.testing.assert_array_equal(tensor.numpy(), big["big"])


def test_writing_to_mapped_weights_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    data = MappedFile(path).data
    data[5000] = 1
    assert path.read_bytes() == bytes(10000)


@pytest.mark.skipif(not has_huge_pages(), reason="the system gives out no huge pages")
def test_a_buffer_is_in_huge_pages() -> None:
    def huge() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge()
    buffer = new_buffer(2**25 + 1)
    assert huge() == before  # nothing is touched yet
    buffer[:] = 1
    assert huge() - before >= 2**14  # half of it at least, in kB, however fragmented memory is


def test_whether_there_are_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = tmp_path / "enabled"
    assert not has_huge_pages(advice)
    for text, there in (
        ("always [madvise] never", True),
        ("[always] madvise never", True),
        ("always madvise [never]", False),
    ):
        advice.write_text(text)
        assert has_huge_pages(advice) == there
    advice.write_text("[always] madvise never")
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    assert not has_huge_pages(advice)


def test_reading_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PIECE", 1000)
    data = np.random.default_rng().integers(0, 256, 12345, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    file = MappedFile(tmp_path / "file")
    (tmp_path / "file").unlink()  # a folder may be built anew while it is in use
    for threads in (1, 3):
        into = np.zeros(11111, np.uint8)
        read_all([Reading(file, 77, into)], threads)
        np.testing.assert_array_equal(into, data[77 : 77 + into.size])
        with pytest.raises(OSError, match="ends too early"):
            read_all([Reading(file, 2000, into)], threads)


def test_moving_behind_the_first_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "choose_placement", lambda asked, nbytes: "resident")
    part = random_arrays(0)
    shard = make_shard(tmp_path / "0.bin", part, gap=0)
    loaded = load_weights([shard], sorted(part), CPU, "auto")
    assert loaded.move is not None
    for tensors in (loaded.tensors, loaded.move().result(timeout=60)):
        for name, tensor in zip(sorted(part), tensors, strict=True):
            np.testing.assert_array_equal(values(tensor), part[name])
    monkeypatch.setattr(weights, "choose_placement", lambda asked, nbytes: "mapped")
    assert load_weights([shard], sorted(part), CPU, "auto").move is None


def test_where_weights_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "available_memory", lambda: 1000)
    monkeypatch.setattr(weights, "has_huge_pages", lambda: True)
    assert choose_placement("auto", 500) == "resident"
    assert choose_placement("auto", 501) == "mapped"
    assert choose_placement("resident", 10**6) == "resident"
    assert choose_placement("mapped", 1) == "mapped"
    monkeypatch.setattr(weights, "has_huge_pages", lambda: False)
    assert choose_placement("auto", 1) == "mapped"
    with pytest.raises(UserError, match="auto, mapped, resident"):
        check_placement("disk")


def test_memory_of_the_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "free_memory", lambda: 12345)
    assert cgroup.available_memory() == 12345
    monkeypatch.setattr(cgroup, "free_memory", lambda: 2**60)
    assert cgroup.available_memory() < 2**60


def test_the_answer_is_the_same_and_a_shifted_folder_runs(
    own_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)

    def answer(placement: str) -> tuple[list[int], np.ndarray]:
        engine = Engine(own_built, "cpu", max_total_tokens=256, weights=placement)
        assert engine.weights == placement
        ids = [i for delta in engine.generate([5, 6, 7], params) for i in delta.token_ids]
        return ids, engine.score_tokens([5, 6, 7, 8])

    ids, logits = answer("mapped")
    # What is moved while tokens are decoded is taken over by a later pass, or not, if that fails.
    monkeypatch.setattr(weights, "choose_placement", lambda asked, nbytes: "resident")
    for new_buffer_of, placement in ((new_buffer, "resident"), (lambda nbytes: 1 / 0, "mapped")):
        monkeypatch.setattr(weights, "new_buffer", new_buffer_of)
        engine = Engine(own_built, "cpu", max_total_tokens=256)
        np.testing.assert_array_equal(engine.score_tokens([5, 6, 7, 8]), logits)
        assert (engine._runtime._moved, engine.weights) == (None, "mapped")
        for _ in range(2):
            again = [i for delta in engine.generate([5, 6, 7], params) for i in delta.token_ids]
            assert again == ids
            if engine._runtime._moved is not None:
                engine._runtime._moved.exception(timeout=60)
        assert engine.weights == placement
    monkeypatch.undo()
    for placement in PLACEMENTS:
        again, same = answer(placement)
        assert again == ids
        np.testing.assert_array_equal(same, logits)

    # As other tools may write it: every tensor begins two bytes behind a round address.
    cache = json.loads((own_built / "tensor-cache.json").read_text())
    for shard in cache["records"]:
        path = own_built / shard["dataPath"]
        path.write_bytes(b"\0\0" + path.read_bytes())
        shard["nbytes"] += 2
        del shard["md5sum"]
        for record in shard["records"]:
            record["byteOffset"] += 2
    (own_built / "tensor-cache.json").write_text(json.dumps(cache))
    for placement in PLACEMENTS:
        again, same = answer(placement)
        assert again == ids
        np.testing.assert_array_equal(same, logits)


def test_what_was_read_is_not_in_memory_twice(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    content = np.random.default_rng().integers(0, 256, 2**25, np.uint8)
    content.tofile(path)
    file = MappedFile(path)
    assert int(file.data.sum(dtype=np.int64)) > 0  # now all of it is in memory
    before = _mapped_kilobytes(path)
    into = np.empty(content.size - 5000, np.uint8)
    read_all([Reading(file, 5000, into)], 2)
    assert before >= content.size // 1024
    assert _mapped_kilobytes(path) < before // 100
    np.testing.assert_array_equal(into, content[5000:])
    np.testing.assert_array_equal(file.data, content)


def _mapped_kilobytes(path: Path) -> int:
    """What this process has in memory of a file that it maps."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
