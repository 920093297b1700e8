"""TVM's pool of threads: how many of them kernels run on, and how they wait.

A pool belongs to the thread that calls into TVM, is made at that thread's first parallel kernel,
and reads the environment then. Its defaults are made for a machine of one's own: half of all
logical CPUs, each thread bound to one, and a tenth of a second of spinning after each kernel.
Bound threads wait for whatever else runs on their CPU while another one is idle, and bind
themselves outside of a `taskset`; so they are not bound here unless TVM_BIND_THREADS says so.
"""

from __future__ import annotations

import os
import threading
from functools import cache

import tvm_ffi

from mlcawq.engine.cores import default_threads
from mlcawq.errors import UserError

# Turns of sched_yield, about 0.3 us each, before a thread that has no work sleeps: longer than
# what lies between two tokens (sampling, text), where waking up would cost the next one a tenth of
# a millisecond; shorter than anybody's idea of idle.
_SPIN_COUNT = 4000
_BIG_CORES = 1  # TVM's usual mode; the others differ in binding only
_MOST_THREADS = 1024

_here = threading.local()


def choose_threads(asked: int | None) -> int:
    """Threads for kernels on the CPU: what was asked for; else what TVM_NUM_THREADS or
    OMP_NUM_THREADS says; else one for each physical core. Call it before the first kernel runs.

    Raises UserError for a number that is none, and for one that TVM's pool in the calling thread
    was not made for, as it may be where that has run kernels already.
    """
    if asked is not None and not 1 <= asked <= _MOST_THREADS:
        raise UserError.one(
            f"{asked} threads", "--threads", f"give a number from 1 to {_MOST_THREADS}"
        )
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(_SPIN_COUNT))
    usual = _usual_count()
    count = usual if asked is None else asked
    # Pools are made for the largest number yet: they cannot grow, and threads without work sleep.
    largest = max(usual, count, _told("TVM_NUM_THREADS") or 1)
    os.environ["TVM_NUM_THREADS"] = str(largest)
    made = use_threads(count)
    if asked is not None and made < asked:
        raise UserError.one(
            f"{asked} threads are asked for, and TVM's pool in this process has {made}",
            "--threads",
            f"set TVM_NUM_THREADS={asked} before the process starts",
        )
    return made


@cache
def _usual_count() -> int:
    """What the process began with: afterwards the environment holds the size of pools."""
    told = _told("TVM_NUM_THREADS") or _told("OMP_NUM_THREADS")
    return default_threads() if told is None else told


def _told(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return max(int(value), 1) if value.isdigit() else None


def use_threads(count: int) -> int:
    """Let the kernels that the calling thread starts from here on run on `count` threads, or on as
    many as its pool was made for. Returns the number.
    """
    if getattr(_here, "asked", None) != count:
        tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, count)
        _here.made = int(tvm_ffi.get_global_func("runtime.NumThreads")())
        _here.asked = count
    return int(_here.made)
