"""Running one step of mlc_llm: its output seen as it comes, its end understood.

The step has a process group of its own, so that whatever it starts (nvcc, a linker) ends with it.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from mlcawq.build.via_mlc.commands import STEPS, VARIABLE
from mlcawq.build.via_mlc.interpreter import other_environment
from mlcawq.errors import UserError

_TAIL_LINES = 40
_TAIL_COLUMNS = 2000  # of one line; a generated source may come as a single one
_GRACE = 2.0  # seconds to end in after an interrupt, and to read on after the end
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_USAGE = 2
_PARSER_ERROR = re.compile(r"^-+ Error -+$(.*)", re.MULTILINE | re.DOTALL)  # as mlc_llm's prints
_PLUGIN_ERROR = re.compile(r"^error: ", re.MULTILINE)


def run_step(argv: Sequence[str], by_hand: str, output: IO[bytes] | None = None) -> None:
    """Run `argv` to its end, with both of its outputs copied to `output` (our stderr) at once.

    by_hand: the command to show when it fails.
    Raises UserError with the end of the output when it fails, KeyboardInterrupt when we are
    interrupted or terminated; the step's processes and temporary files are gone then.
    """
    with tempfile.TemporaryDirectory(prefix="mlcawq-step-", ignore_cleanup_errors=True) as scratch:
        status, tail = _run(argv, scratch, output)
    if status:
        raise _failure(argv, status, tail.text(), by_hand)


def _run(argv: Sequence[str], scratch: str, output: IO[bytes] | None) -> tuple[int, Tail]:
    environment = {**other_environment(), "PYTHONUNBUFFERED": "1", "TMPDIR": scratch}
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError.one(
            f"cannot be started: {error.strerror}", argv[0], "check --mlc-python"
        ) from error
    assert process.stdout is not None
    tail, muted = Tail(), threading.Event()
    arguments = (process.stdout, tail, output, muted)
    copier = threading.Thread(target=_copy, args=arguments, daemon=True)
    copier.start()
    with _terminated_as_interrupted():
        try:
            status = process.wait()
            # A process that the step left behind may hold its end of the pipe for ever.
            copier.join(_GRACE)
        except BaseException:
            muted.set()  # of its traceback nobody learns more than that it was interrupted
            _stop(process)
            raise
        finally:
            _signal(process, signal.SIGKILL)
            copier.join(_GRACE)
    return status, tail


class Tail:
    """The last lines of an output as a terminal would show them: a line that is written over by a
    carriage return, as progress bars do, counts once, in its last state.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._open = ""
        # A character may come in two blocks.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, block: bytes) -> None:
        *lines, rest = (self._open + self._decoder.decode(block)).split("\n")
        self._lines.extend(filter(None, map(_visible, lines)))
        self._open = rest.rpartition("\r")[2][-_TAIL_COLUMNS:]

    def text(self) -> str:
        last = _visible(self._open)
        return "\n".join([*self._lines, last] if last else self._lines)


def _visible(line: str) -> str:
    shown = _ESCAPES.sub("", line.rstrip().rpartition("\r")[2])
    return shown[:_TAIL_COLUMNS] + (" …" if len(shown) > _TAIL_COLUMNS else "")


def _copy(source: IO[bytes], tail: Tail, output: IO[bytes] | None, muted: threading.Event) -> None:
    """Read `source` to its end, whatever happens, so that the step never waits."""
    target = output if output is not None else sys.stderr.buffer
    while block := source.read1(65536):  # type: ignore[attr-defined]
        tail.feed(block)
        if not muted.is_set():
            try:
                target.write(block)
                target.flush()
            except (OSError, ValueError):  # the reader of our stderr has gone
                muted.set()
    source.close()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP are raised as KeyboardInterrupt, so that the step ends with us."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    # nohup asks for being ignored.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the step; kill it if it takes long, as in code that does not look for signals."""
    _signal(process, signal.SIGINT)
    try:
        process.wait(_GRACE)
    except BaseException:  # too slow, or interrupted again
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _failure(argv: Sequence[str], status: int, tail: str, by_hand: str) -> UserError:
    step = f"mlc_llm {next(word for word in argv if word in STEPS)}"
    again = f"to repeat it by hand:\n     {by_hand}"
    if VARIABLE in by_hand:
        again += "\n     (the same command with --dry-run shows how that file is made)"
    if os.strerror(errno.ENOSPC) in tail:
        return UserError.one(
            f"{step}: the disk is full; nothing was written",
            "",
            "free some space (temporary files go to $TMPDIR), or choose another -o",
        )
    told = list(_PLUGIN_ERROR.finditer(tail))
    if status == 1 and told and "Traceback (most recent call last)" not in tail:
        # The plug-in's own message says what, where and what to do already.
        return UserError.one(f"{step}: {tail[told[-1].end() :]}")
    if status == _USAGE and (refused := _PARSER_ERROR.search(tail)):
        return UserError.one(f"{step}: {refused[1].strip()}", "", again)
    ending = f"exit status {status}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        ending = f"killed by {name}"
        if name == "SIGKILL":
            ending += ", as the system does when memory runs out"
    said = f"; its last words:\n{_indented(tail)}" if tail else "; it said nothing"
    if absent := re.search(r"No module named '([\w.]+)'", tail):
        package = absent[1].partition(".")[0].replace("_", "-")
        again = f"{argv[0]} -m pip install {package}\n  -> {again}"
    return UserError.one(f"{step} failed ({ending}){said}", "", again)


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
