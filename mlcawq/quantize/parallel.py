"""The same work on many chunks of a tensor, on all threads that torch may use.

torch splits each small operation over its threads and waits for all of them after every one; a
chain of them on a busy machine is mostly waiting. Here each thread takes a whole chunk through the
whole chain, which also keeps the chunk in that core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in their order. Runs without gradients."""
    return list(_pool(torch.get_num_threads()).map(torch.no_grad()(work), items))


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "chunk", initializer=torch.set_num_threads, initargs=(1,))
