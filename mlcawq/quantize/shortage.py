"""Memory or disk that runs out half-way: one message, and nothing lost."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mlcawq.checkpoint.writing import is_disk_full
from mlcawq.errors import UserError


@contextmanager
def shortage_told(out: Path) -> Iterator[None]:
    """Turn the errors that mean too little memory or disk into UserError. out: of the work."""
    try:
        yield
    except Exception as error:
        if is_memory_short(error):
            raise UserError.one(
                "the memory ran out; the finished blocks are kept",
                "memory",
                "run the same command again with a smaller --max-memory, or with other programs "
                "closed",
            ) from error
        if is_disk_full(error):
            raise UserError.one(
                "the disk is full; the finished blocks are kept",
                str(out),
                "free some space and run the same command again",
            ) from error
        raise


def is_memory_short(error: Exception) -> bool:
    """Whether an error of Python, numpy, torch or the system means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has no type of its own for the memory of a CPU.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
