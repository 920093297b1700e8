"""One step of mlc_llm as a process: its output, its end, and what is left of it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_mlc import FakeMlc, gone

from mlcawq.build.via_mlc.run import Tail, run_step
from mlcawq.errors import UserError


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def fake(tmp_path: Path) -> FakeMlc:
    return FakeMlc(tmp_path / "bin")


def step(fake: FakeMlc, output: io.BytesIO | None = None) -> bytes:
    output = output or io.BytesIO()
    out = fake.folder / "out"
    out.mkdir(exist_ok=True)
    argv = [str(fake.python), "convert_weight", "--output", str(out)]
    run_step(argv, "BY HAND", output)
    return output.getvalue()


def failure(fake: FakeMlc, **plays: object) -> str:
    fake.plays(**plays)
    with pytest.raises(UserError) as error:
        step(fake)
    return str(error.value)


def test_output_is_passed_on_as_it_comes(fake: FakeMlc) -> None:
    assert step(fake) == b"convert_weight begins\nconvert_weight is done\n"


def interrupted(fake: FakeMlc, number: signal.Signals, scratch: Path) -> float:
    """Signal a program that runs a step, when the step hangs; returns the seconds that it takes.

    The program is one of its own: a signal to the tests would be one to all that runs them.
    """
    out = str(fake.folder)
    argv = [str(fake.python), "convert_weight", "--output", out]
    # Tests that nohup started would hand on that they do not heed SIGHUP.
    code = ""
    if number == signal.SIGHUP:
        code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    code += f"from mlcawq.build.via_mlc.run import run_step; run_step({argv!r}, 'BY HAND')"
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert program.stderr is not None
    # What the step printed has come through while it runs.
    assert [program.stderr.readline() for _ in range(2)] == ["convert_weight begins\n", "hanging\n"]
    start = time.monotonic()
    program.send_signal(number)
    rest = program.communicate(timeout=60)[1]
    assert rest.rstrip().endswith("KeyboardInterrupt")
    assert program.returncode == -signal.SIGINT
    assert all(map(gone, fake.pids))
    assert list(scratch.iterdir()) == []
    return time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_all_that_the_step_started(
    number: signal.Signals, fake: FakeMlc, scratch: Path
) -> None:
    fake.plays(convert_weight="hangs")
    interrupted(fake, number, scratch)


def test_a_step_that_ignores_interrupts_is_killed(fake: FakeMlc, scratch: Path) -> None:
    fake.plays(convert_weight="hangs", stubborn=True)
    assert interrupted(fake, signal.SIGINT, scratch) < 30


def test_a_failure_shows_the_tail_and_the_command(fake: FakeMlc, scratch: Path) -> None:
    message = failure(fake, convert_weight="fails")
    assert list(scratch.iterdir()) == []
    assert "mlc_llm convert_weight failed (exit status 1)" in message
    assert "  | compiling 99%\n" in message
    assert "\x1b" not in message
    assert "compiling 1%" not in message
    assert "  | ValueError: no such layer" in message
    assert message.endswith("to repeat it by hand:\n     BY HAND")


def test_a_flood_is_cut_in_the_message_only(fake: FakeMlc) -> None:
    fake.plays(convert_weight="floods")
    output = io.BytesIO()
    with pytest.raises(UserError) as error:
        step(fake, output)
    assert "exit status 3" in str(error.value)
    assert "line 19999 " in str(error.value)
    assert "line 10000 " not in str(error.value)
    assert len(str(error.value)) < 10_000
    assert output.getvalue().count(b"\n") == 20_001


def test_deaths_and_known_causes_are_named(fake: FakeMlc) -> None:
    message = failure(fake, convert_weight="dies")
    assert "killed by SIGKILL, as the system does when memory runs out" in message
    message = failure(fake, convert_weight="full")
    assert "the disk is full; nothing was written" in message
    message = failure(fake, convert_weight="lacks")
    assert f"{fake.python} -m pip install fast-api" in message
    message = failure(fake, convert_weight="misunderstands")
    assert message.startswith("mlc_llm convert_weight: argument --opt: invalid value: 'O9'\n  -> ")
    # The plug-in's own message stands alone: its user knows what to do.
    message = failure(fake, convert_weight="complains")
    assert message == (
        "mlc_llm convert_weight: config.json: group_size 48 is odd\n  -> quantize again"
    )


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be started: No such file"):
        run_step([str(tmp_path / "python"), "compile"], "BY HAND", io.BytesIO())


def test_a_process_that_was_left_behind_does_not_hold_us(
    fake: FakeMlc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlcawq.build.via_mlc.run._GRACE", 0.5)
    fake.plays(convert_weight="leaves")
    start = time.monotonic()
    step(fake)
    assert time.monotonic() - start < 10


def test_a_reader_that_has_gone_does_not_stop_the_step(fake: FakeMlc) -> None:
    closed = io.BytesIO()
    closed.close()
    argv = [str(fake.python), "compile", "--output", str(fake.folder / "library")]
    run_step(argv, "", closed)
    assert (fake.folder / "library").exists()


def test_the_tail_is_what_a_terminal_would_show() -> None:
    tail = Tail()
    for block in (
        b"one\n\ntw",
        b"o\n 10%\r 20%",
        b"\r 30%\n",
        b"\x1b[1mbold\x1b[0m\n",
        b"\xff \xc3",
        b"\xb6pen",
    ):
        tail.feed(block)
    assert tail.text() == "one\ntwo\n 30%\nbold\n\ufffd öpen"
    assert Tail().text() == ""
    tail.feed(b"z" * 100_000 + b"\n")
    assert len(tail.text()) < 5000
