"""Several processes on one quantization, as torchrun starts them (torch.distributed).

Each holds its own share of the calibration text and runs the same program: sums over tokens are
taken over all of them, so that all reach the same decisions from the same numbers. The first one
alone writes. In a single process everything here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mlcawq.errors import Problem, UserError, raise_all

Item = TypeVar("Item")
Result = TypeVar("Result")

# The first process may write for hours while the others wait. Who dies is noticed at once: its
# connections close.
_PATIENCE = timedelta(days=2)
_CPU = torch.device("cpu")


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started several of us."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Which process of this machine we are: by custom, the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def session() -> Iterator[None]:
    """Join the other processes, if there are any, and leave them at the end.

    Whatever ends one ends all, and is told once: the first to fail keeps its error, in the others
    it becomes SystemExit.
    """
    if not launched():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    store = dist.PrefixStore("mlcawq", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield
    except Exception as error:
        if not _first_to_fail(store):
            sys.exit(1)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError.one(
                f"lost contact with another of the {size} processes",
                f"rank {rank}",
                "see what it or the system says of its end (out of memory?), and run the same "
                "command again: the finished blocks are kept",
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _first_to_fail(store: Any) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store has gone with the process that had it
        return False


def rank() -> int:
    """Which of the processes we are, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether we are the process that writes and speaks."""
    return rank() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Our part of `items`: in the order of the ranks the parts make the whole, in its order."""
    count = len(items)
    return items[count * rank() // ranks() : count * (rank() + 1) // ranks()]


def sum_(*tensors: torch.Tensor) -> None:
    """Put into each tensor its sum over all ranks."""
    if ranks() > 1:
        for tensor in tensors:
            # The tensor itself is what is reduced: a copy of it would stay unsummed.
            dense = tensor if tensor.is_contiguous() else tensor.contiguous()
            dist.all_reduce(dense)
            if dense is not tensor:
                tensor.copy_(dense)


def total(value: float) -> float:
    """The sum of a number over all ranks."""
    if ranks() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=_CPU)
    dist.all_reduce(summed)
    return float(summed)


def before(count: int) -> int:
    """The sum of `count` over the ranks before ours."""
    return sum(_gathered(count)[: rank()])


def largest(value: int) -> int:
    """The largest `value` of any rank."""
    return max(_gathered(value))


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        _gathered(None)


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first rank, or the error it raises there, on all of them."""
    if ranks() == 1:
        return work()
    found: list[Any] = [None, None]
    if is_first():
        try:
            found[0] = work()
        except UserError as error:
            found[1] = error.problems
    dist.broadcast_object_list(found, device=_CPU)
    raise_all(found[1] or ())
    return found[0]


def everywhere(work: Callable[[], Result]) -> Result:
    """What `work` gives here. Where it raises UserError on any rank, all raise it."""
    if ranks() == 1:
        return work()
    result, problems = None, tuple[Problem, ...]()
    try:
        result = work()
    except UserError as error:
        problems = error.problems
    raise_all(dict.fromkeys(problem for part in _gathered(problems) for problem in part))
    return result  # type: ignore[return-value]


def to_first(parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """On the first rank: its `parts` and then those of the others, in order. Elsewhere nothing.

    parts: tensors in the CPU's memory; one at a time is held.
    """
    if ranks() == 1 or is_first():
        yield from parts
    if is_first():
        for source in range(1, ranks()):
            while (part := _received(source)) is not None:
                yield part
    else:
        for part in parts:
            dist.send_object_list([(tuple(part.shape), part.dtype)], 0, device=_CPU)
            dist.send(part.contiguous().view(torch.uint8), 0)
        dist.send_object_list([None], 0, device=_CPU)


def from_first(tensor: torch.Tensor) -> None:
    """Put what the first rank has in `tensor` into everyone's."""
    if ranks() > 1:
        dist.broadcast(tensor, 0)


def _received(source: int) -> torch.Tensor | None:
    described: list[Any] = [None]
    dist.recv_object_list(described, source, device=_CPU)
    if described[0] is None:
        return None
    shape, dtype = described[0]
    part = torch.empty(shape, dtype=dtype, device=_CPU)
    dist.recv(part.view(torch.uint8), source)
    return part


def _gathered(value: Any) -> list[Any]:
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values
