"""Writing an answer as it comes, and stopping it with Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlcawq.engine.engine import Delta


def show(
    deltas: Generator[Delta, None, None], write: Callable[[str], object] | None
) -> tuple[str, str]:
    """Write an answer as it comes. Returns it and why it ended; "interrupted" after Ctrl-C."""
    parts: list[str] = []
    reason = "interrupted"
    with interrupts() as interrupted:
        for delta in deltas:
            parts.append(delta.text)
            if write is not None and delta.text:
                write(delta.text)
                sys.stdout.flush()
            if delta.finish_reason is not None:
                reason = delta.finish_reason
            elif interrupted:
                break
        deltas.close()
    return "".join(parts), reason


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of raising: the model is stopped between two steps only."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
