"""Whether the files of weights are what was written: their md5 sums, computed once a file.

Sums take a second or two a gigabyte, at every start. So a file that was found intact is
remembered by what changes when it is written to: size, times of modification and of change of
its status (which no program can set back), inode and device. The memory is one JSON file in the
user's cache folder; without it, or with `everything`, all sums are computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlcawq.engine.artifact import Shard
from mlcawq.errors import Problem

# A file's times come from a clock of some milliseconds: of a file that has just been written, a
# change in the same tick would not show.
_SETTLED = 2.0  # seconds
_PIECE = 2**20


def check_shards(
    shards: Sequence[Shard], threads: int, *, everything: bool = False
) -> list[Problem]:
    """Problems of all shards whose bytes are not those of their md5 sums.

    threads: that compute sums. everything: those of unchanged files too.
    """
    known = {} if everything else _read_memory()
    unknown = [
        shard
        for shard in shards
        if shard.md5 is not None and known.get(_key(shard)) != _state(shard).stamp
    ]
    if not unknown:
        return []
    with ThreadPoolExecutor(threads) as pool:
        states = list(pool.map(_intact, unknown))
    checked = list(zip(unknown, states, strict=True))
    _remember({_key(shard): state.stamp for shard, state in checked if state and state.settled})
    return [
        Problem(
            "damaged: its md5 sum is not the one in tensor-cache.json",
            str(shard.path),
            "copy the file again, or run `mlcawq convert-weight` again",
        )
        for shard, state in checked
        if state is None
    ]


@dataclass(frozen=True)
class _State:
    """stamp: equal as long as nobody writes to the file. settled: that can be relied on."""

    stamp: str
    settled: bool


def _state(shard: Shard) -> _State:
    stat = shard.path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    facts = (shard.md5, stat.st_size, *times, stat.st_ino, stat.st_dev)
    settled = max(times) < (time.time() - _SETTLED) * 1e9
    return _State(" ".join(map(str, facts)), settled)


def _intact(shard: Shard) -> _State | None:
    """The state in which a file's sum was found right; None where it is wrong."""
    state = _state(shard)
    digest = hashlib.md5(usedforsecurity=False)
    size = 0
    with shard.path.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return state if digest.hexdigest() == shard.md5 and size == shard.nbytes else None


def _key(shard: Shard) -> str:
    return str(shard.path.resolve())


def _memory_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "mlcawq" / "checked_weights.json"


def _read_memory() -> dict[str, str]:
    try:
        memory = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody knows where home is
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(stamps: dict[str, str]) -> None:
    """Add stamps, and forget files that are gone. Of two processes that do so at once one loses
    its stamps, and the sums are computed again.
    """
    if not stamps:
        return
    kept = {key: stamp for key, stamp in _read_memory().items() if Path(key).is_file()}
    try:
        file = _memory_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump({**kept, **stamps}, stream)
        os.replace(name, file)
    except (OSError, RuntimeError):
        return  # without a cache folder the sums are computed every time
