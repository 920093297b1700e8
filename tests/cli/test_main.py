"""The program as a whole: help, exit codes, messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlcawq.cli.main import COMMANDS, _noticing_interrupts


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlcawq", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_lists_every_command_and_loads_none() -> None:
    probe = (
        "import sys, runpy; sys.argv = ['mlcawq', '--help']\n"
        "try: runpy.run_module('mlcawq', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'tvm', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_without_loading_torch_or_tvm(name: str) -> None:
    probe = (
        f"import sys, runpy; sys.argv = ['mlcawq', '{name}', '--help']\n"
        "try: runpy.run_module('mlcawq', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'tvm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: mlcawq" in result.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("mlcawq ")


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["no-such-command"], ["chat", "--no-such-option"], ["chat"]):
        result = run(*arguments)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr


def test_a_user_error_exits_with_1_and_one_message() -> None:
    result = run("inspect", "/no/such/folder")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "/no/such/folder" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_no_bug() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mlcawq", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "No space left on device\n  -> free some space" in result.stderr
    assert "bug" not in result.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(place: str) -> None:
    words = ["inspect", "/no/such/folder"]
    words = ["--debug", *words] if place == "before" else [*words, "--debug"]
    result = run(*words)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_an_interrupt_that_tvm_hands_on_is_one() -> None:
    """Python that TVM calls raises KeyboardInterrupt, and a RuntimeError without words arrives."""
    # Who starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), _noticing_interrupts():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise RuntimeError from None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(RuntimeError, match="a fault"), _noticing_interrupts():
            raise RuntimeError("a fault")
    finally:
        signal.signal(signal.SIGINT, before)
