"""The shape of an inspection's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlcawq.errors import Problem, UserError

_T = TypeVar("_T")


@dataclass
class Description:
    """kind: what it is, in words. facts: name -> value, JSON types, in the order of showing.

    problems: what keeps it from being used; next_step: the command that makes sense now.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    next_step: str = ""

    def attempt(self, look: Callable[[], _T]) -> _T | None:
        """The result of `look`, or None with its problems noted (each once)."""
        try:
            return look()
        except UserError as error:
            self.problems += [p for p in error.problems if p not in self.problems]
            return None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            **self.facts,
            "problems": [vars(problem) for problem in self.problems],
        }


def size(count: int) -> str:
    """Bytes for a reader: 12.3 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
