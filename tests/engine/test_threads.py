"""How many threads kernels run on, and what they do when there is nothing to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlcawq.engine.cores import default_threads
from mlcawq.engine.engine import Engine
from mlcawq.errors import UserError

_RUN = """
import json, os, sys, threading, time
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.engine import Engine
from mlcawq.engine.sampling import SamplingParams
import tvm_ffi
count = tvm_ffi.get_global_func("runtime.NumThreads")
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
found = []
def answer(threads):
    engine = Engine(sys.argv[1], "cpu", max_total_tokens=64, threads=threads)
    ids = [i for d in engine.generate([5, 6, 7], params) for i in d.token_ids]
    found.append([engine.threads, int(count()), ids])
    return engine
for threads in json.loads(sys.argv[2]):
    engine = answer(threads)
other = threading.Thread(target=lambda: (
    found.append([engine.threads, 0, [i for d in engine.generate([5, 6, 7], params)
                                      for i in d.token_ids]]),
    found.append(int(count()))))
other.start()
other.join()
before = time.process_time()
time.sleep(0.5)
print(json.dumps([found, time.process_time() - before, sorted(os.sched_getaffinity(0))]))
"""


def run(built: Path, threads: list[int | None], **variables: str) -> Any:
    names = ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    result = subprocess.run(
        [sys.executable, "-c", _RUN, str(built), json.dumps(threads)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, **variables},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_asked_for_in_turn_and_from_another_thread(built: Path) -> None:
    found, idle, affinity = run(built, [3, 1, 2])
    *engines, elsewhere, count = found
    assert [engine[:2] for engine in engines] == [[3, 3], [1, 1], [2, 2]]
    assert count == 2  # the pool of the other thread, which began with this engine
    ids = [*(engine[2] for engine in engines), elsewhere[2]]
    assert len(ids[0]) == 4
    assert all(same == ids[0] for same in ids)
    assert idle < 0.1  # of half a second, in which two pools have nothing to do
    assert affinity == sorted(os.sched_getaffinity(0))  # nobody was bound


def test_the_default_and_what_the_environment_says(built: Path) -> None:
    assert run(built, [None])[0][0][:2] == [default_threads(), default_threads()]
    assert run(built, [None], OMP_NUM_THREADS="3")[0][0][:2] == [3, 3]
    found, *_ = run(built, [None, 4, None], OMP_NUM_THREADS="3", TVM_NUM_THREADS="5")
    assert [engine[:2] for engine in found[:3]] == [[5, 5], [4, 4], [5, 5]]


@pytest.mark.parametrize("threads", [0, -1, 100000])
def test_numbers_that_are_none(built: Path, threads: int) -> None:
    with pytest.raises(UserError, match="from 1 to"):
        Engine(built, threads=threads)
