"""Running other programs for a look at them: never a crash, never a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a program printed, and whether it ran to a good end."""

    ok: bool
    stdout: str = ""
    error: str = ""

    @property
    def first_line(self) -> str:
        return self.stdout.strip().splitlines()[0] if self.stdout.strip() else ""


def run(
    command: Sequence[str], timeout: float = 20.0, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run `command`; `error` says in a line why it failed (not found, signal, time, message)."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except FileNotFoundError:
        return Outcome(False, error="not found")
    except subprocess.TimeoutExpired:
        return Outcome(False, error=f"no answer in {timeout:.0f} s")
    except OSError as error:
        return Outcome(False, error=str(error))
    if done.returncode < 0:
        return Outcome(False, done.stdout, f"killed by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}"
        return Outcome(False, done.stdout, reason)
    return Outcome(True, done.stdout)


def run_python(
    code: str, python: str = sys.executable, timeout: float = 60.0
) -> tuple[dict[str, Any], str]:
    """Run code that prints one JSON object on its last line: (object, ""), or ({}, what failed).

    A library that crashes the process when it is imported takes only that process with it.
    """
    outcome = run([python, "-c", code], timeout)
    if not outcome.ok:
        return {}, outcome.error
    try:
        content = json.loads(outcome.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}, "unreadable answer"
    return (content, "") if isinstance(content, dict) else ({}, "unreadable answer")
