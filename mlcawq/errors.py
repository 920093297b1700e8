"""The one error that users see: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that a user can act on.

    what: the fact ("in_features 4000 is not a multiple of the group size 128").
    where: file, tensor, layer or option it was found in; empty when `what` says it.
    fix: what to do now, as an instruction; empty when nothing can be done.
    """

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.fix}" if self.fix else text


class UserError(Exception):
    """Everything that is wrong, at once. The command line prints it and exits with 1."""

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("a UserError names at least one problem")
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def one(cls, what: str, where: str = "", fix: str = "") -> UserError:
        return cls(Problem(what, where, fix))


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise one UserError holding all `problems`; return when there are none."""
    found = tuple(problems)
    if found:
        raise UserError(*found)
