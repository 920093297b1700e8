"""`mlcawq chat` as a user runs it: one-shot over pipes, and a session in a terminal."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pexpect
import pytest

from mlcawq.cli.main import main

PROGRAM = [sys.executable, "-m", "mlcawq", "chat"]
PROMPT = ">>> "


@pytest.fixture(scope="session")
def built() -> Path:
    from built_model import built_tiny_llama

    return built_tiny_llama()[1]


@pytest.fixture
def plain(built, tmp_path):
    """The same model without a chat template."""
    folder = Path(shutil.copytree(built, tmp_path / "plain"))
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    config["conv_template"] = {"name": "LM", "roles": {"user": "", "assistant": ""}, "seps": [""]}
    (folder / "mlc-chat-config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """The program inside this process: arguments and standard input to output and exit code."""

    def call(*arguments, text="", code=0):
        monkeypatch.setattr(sys, "argv", ["mlcawq", "chat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        try:
            main()
            exit_code = 0
        except SystemExit as exit_:
            exit_code = exit_.code or 0
        out, err = capsys.readouterr()
        assert exit_code == code, err
        return Result(out, err)

    return call


@pytest.fixture
def document(run):
    """The JSON document of a one-shot answer."""
    return lambda *arguments: json.loads(run(*arguments, "--json").stdout)


class Result(NamedTuple):
    stdout: str
    stderr: str


# ------------------------------------------------------------------------------------ one-shot


def test_stdout_is_the_answer_and_nothing_else(document, built):
    arguments = (str(built), "--prompt", "Hello", "--temperature", "0", "--max-tokens", "12")
    full = document(*arguments)
    shown = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=True)
    assert shown.stdout == full["answer"] + "\n"
    assert full["usage"]["completion_tokens"] == 12
    assert full["finish_reason"] == "length"
    assert full["sampling"]["temperature"] == 0.0
    assert full["timings"]["decode_tokens_per_second"] > 0
    assert "cut off" in shown.stderr


def test_the_prompt_may_come_from_stdin(run, built):
    options = (built, "--temperature", "0", "--max-tokens", "5")
    asked = run(*options, "--prompt", "Two\nlines")
    assert run(*options, "--prompt", "-", text="Two\nlines\n").stdout == asked.stdout
    assert run(*options, text="Two\nlines\n").stdout == asked.stdout
    for empty in ("", "\n"):
        assert "prompt is empty" in run(*options, text=empty, code=1).stderr
    assert "prompt is empty" in run(*options, "--prompt", "", code=1).stderr


def test_bytes_that_are_no_text(built):
    command = [*PROGRAM, str(built)]
    for extra, stdin in (([], b"caf\xe9"), ([b"--prompt", b"caf\xe9"], b"")):
        result = subprocess.run([*command, *extra], input=stdin, capture_output=True, check=False)
        assert result.returncode == 1
        assert b"not valid UTF-8" in result.stderr


def test_a_system_message_that_is_no_text(built):
    command = [*PROGRAM, str(built), "--prompt", "x", "--system", b"caf\xe9"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 1
    assert b"the system message is not valid UTF-8" in result.stderr


def test_a_closed_stdin(run, built, monkeypatch):
    options = (built, "--temperature", "0", "--max-tokens", "5")
    expected = run(*options, "--prompt", "Hello").stdout
    monkeypatch.setattr(io, "StringIO", lambda text: None)  # what `run` gives as standard input
    assert run(*options, "--prompt", "Hello").stdout == expected
    assert "prompt is empty" in run(*options, code=1).stderr


def test_a_terminal_without_the_characters_of_an_answer(built):
    result = subprocess.run(
        [*PROGRAM, str(built), "--prompt", "Hello", "--temperature", "0", "--max-tokens", "12"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0
    assert b"?" in result.stdout


def test_sampling_options_reach_the_sampler(document, built):
    base = (built, "--prompt", "Hello", "--max-tokens", 16)
    seeded = [document(*base, "--seed", s)["answer"] for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    greedy = document(*base, "--temperature", 0)
    assert document(*base, "--top-k", 1)["answer"] == greedy["answer"]
    assert document(*base, "--top-p", 1e-9)["answer"] == greedy["answer"]
    assert document(*base, "--min-p", 1)["answer"] == greedy["answer"]
    stop = greedy["answer"][3:5]
    stopped = document(*base, "--temperature", 0, "--stop", "never", "--stop", stop)
    assert stopped["answer"] == greedy["answer"].partition(stop)[0]
    assert stopped["finish_reason"] == "stop"
    looping = (built, "--prompt", "Hello" * 20, "--max-tokens", 24, "--temperature", 0)
    loop = document(*looping)["answer"]
    for option in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert document(*looping, option, 2)["answer"] != loop


def test_a_system_message_is_part_of_the_prompt(document, built):
    base = (built, "--prompt", "Hello", "--max-tokens", 1)
    with_system = document(*base, "--system", "Be brief.")
    assert with_system["usage"]["prompt_tokens"] > document(*base)["usage"]["prompt_tokens"]


def test_defaults_come_from_the_model(document, built, tmp_path):
    folder = Path(shutil.copytree(built, tmp_path / "own"))
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    (folder / "mlc-chat-config.json").write_text(
        json.dumps({**config, "temperature": 0.25, "top_k": 7})
    )
    sampling = document(folder, "--prompt", "a", "--max-tokens", 1, "--top-k", 3)["sampling"]
    assert (sampling["temperature"], sampling["top_k"]) == (0.25, 3)


def test_a_model_without_a_template_continues_text(run, document, plain):
    options = (plain, "--prompt", "The quick", "--temperature", 0, "--max-tokens", 4)
    result = run(*options)
    assert "no chat template" in result.stderr
    assert "template" not in result.stdout
    assert document(*options)["usage"]["prompt_tokens"] < 9
    assert "takes no system message" in run(*options, "--system", "x", code=1).stderr


def test_wrong_values_are_named_together_before_anything_is_loaded(run, tmp_path):
    result = run(tmp_path, "--prompt", "x", "--temperature", -1, "--top-p", 2, code=1)
    assert "temperature is -1.0" in result.stderr
    assert "top_p is 2.0" in result.stderr
    assert result.stdout == ""


def test_threads_and_weights(document, run, built):
    found = [
        document(built, "--prompt", "x", "--temperature", 0, "--max-tokens", 5, *arguments)
        for arguments in (
            ("--threads", 1, "--weights", "mapped"),
            ("--weights", "resident"),
        )
    ]
    assert found[0]["answer"] == found[1]["answer"]
    assert (found[0]["threads"], found[0]["weights"]) == (1, "mapped")
    assert (found[1]["threads"] >= 1, found[1]["weights"]) == (True, "resident")
    assert "--threads" in run(built, "--prompt", "x", "--threads", 0, code=2).stderr
    assert "mapped" in run(built, "--prompt", "x", "--weights", "disk", code=2).stderr


def test_a_long_prompt_and_a_wrong_folder_are_clear_errors(run, built, tmp_path):
    assert "context window" in run(built, "--prompt", "x " * 500, code=1).stderr
    assert "mlc-chat-config.json is missing" in run(tmp_path, "--prompt", "x", code=1).stderr
    assert "No such option" in run(built, "--promt", "x", code=2).stderr


def test_ctrl_c_stops_a_one_shot_answer_with_130(built):
    arguments = ["mlcawq", "chat", str(built), "--prompt", "Hello", "--seed", "1"]
    code = (
        "import os, signal, sys\n"
        "from mlcawq.engine.runtime_only import import_tvm_runtime\n"
        "import_tvm_runtime()\n"
        "from mlcawq.engine import engine\n"
        "step = engine.Engine.step\n"
        "def interrupted(self):\n"
        "    deltas = step(self)\n"
        "    if deltas and deltas[0].stats.completion_tokens == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return deltas\n"
        "engine.Engine.step = interrupted\n"
        "from mlcawq.cli.main import main\n"
        f"sys.argv = {arguments!r}\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 130
    assert result.stdout.endswith("\n")
    assert 1 < len(result.stdout) < 60


# ------------------------------------------------------------------------------------- session


# The same program with a pause after every token, as of a larger model.
SLOW = """
import sys, time
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine import engine
step = engine.Engine.step
def slow(self):
    time.sleep(0.05)
    return step(self)
engine.Engine.step = slow
from mlcawq.cli.main import main
sys.argv = ["mlcawq", "chat", *sys.argv[1:]]
main()
"""


class Session:
    """A chat in a pseudo-terminal."""

    def __init__(self, folder, home, *arguments, program=PROGRAM):
        self.child = pexpect.spawn(
            program[0],
            [*program[1:], str(folder), *map(str, arguments)],
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            dimensions=(40, 200),
            env={
                **os.environ,
                "XDG_STATE_HOME": str(home),
                "TERM": "dumb",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        self.child.expect_exact("/help for help")
        self.child.expect_exact(PROMPT)

    def say(self, text, expect=PROMPT):
        """Type a line; everything printed until the next prompt."""
        self.child.send(text + "\r")
        self.child.expect_exact(expect)
        return self.child.before

    def end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def session(built, tmp_path):
    chat = Session(built, tmp_path, "--temperature", 0, "--max-tokens", 12)
    yield chat
    chat.child.close(force=True)


def test_a_conversation_with_every_command(session, tmp_path):
    assert "nothing has been asked" in session.say("/stats")
    first = session.say("Hello")
    assert "cut off at the length limit" in first
    stats = session.say("/stats")
    assert "tokens/s" in stats
    assert "answer 12 tokens" in stats
    session.say("More")
    assert "(0 from the cache)" not in session.say("/stats")
    session.say("/regen")
    assert "3 answers" in session.say("/stats")

    for command in ("/help", "/set", "/system", "/reset"):
        assert "error" not in session.say(command)
    for name in ("/stats", "/reset", "/set", "/system", "/regen", "/save", "/exit"):
        assert name in session.say("/help")
    assert "top_k = 5" in session.say("/set top_k=5")
    assert "max_tokens = None" in session.say("/set max-tokens=none")
    assert "must be above 0" in session.say("/set top_p=0")
    assert "must be a whole number" in session.say("/set seed=x")
    assert "is no setting" in session.say("/set heat=1")
    assert "did you mean /stats" in session.say("/stat")
    session.say("/set max_tokens=4")

    assert "new conversation" in session.say("/system Be brief.")
    assert "Be brief." in session.say("/system")
    session.say("Question one")
    session.say("//slash")
    session.say('"""/etc/hosts"""')
    os.write(session.child.child_fd, b"caf\xe9\r")  # pasted bytes that are no text
    session.child.expect_exact(PROMPT)
    assert "system message" not in session.say("  /stats")
    path = tmp_path / "saved.json"
    assert "saved to" in session.say(f"/save {path}")
    roles = [m["role"] for m in json.loads(path.read_text())]
    assert roles == ["system", *["user", "assistant"] * 4]
    asked = [m["content"] for m in json.loads(path.read_text()) if m["role"] == "user"]
    assert asked[1:] == ["/slash", "/etc/hosts", "caf?"]
    assert "File exists" in session.say(f"/save {path}")
    session.say(f"/save {tmp_path / 'saved.md'}")
    assert "## User\n\nQuestion one" in (tmp_path / "saved.md").read_text()
    assert "needs a file name" in session.say("/save")
    session.say("/reset")
    assert "no answer to replace" in session.say("/regen")
    session.child.send("/exit\r")
    assert session.end() == 0


def test_several_lines(session, tmp_path):
    session.child.send("one \\\r")
    session.say("two")
    session.child.send('"""three\r')
    session.say('four"""')
    session.child.send("five\x1b\r")
    session.say("six")
    path = tmp_path / "lines.json"
    session.say(f"/save {path}")
    asked = [m["content"] for m in json.loads(path.read_text()) if m["role"] == "user"]
    assert asked == ["one \ntwo", "three\nfour", "five\nsix"]


def test_ctrl_c_stops_the_answer_and_not_the_program(built, tmp_path):
    chat = Session(built, tmp_path, "--temperature", 0, program=[sys.executable, "-c", SLOW])
    chat.child.send("Hello\r")
    chat.child.expect(r"Hello.*\n.")  # the echo of the question, and the answer has begun
    chat.child.kill(signal.SIGINT)
    chat.child.expect_exact("(stopped)")
    chat.child.expect_exact(PROMPT)
    saved = tmp_path / "partial.json"
    chat.say(f"/save {saved}")
    turns = json.loads(saved.read_text())
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert 0 < len(turns[1]["content"]) < 100
    chat.say("/set max_tokens=3")
    chat.say("Still there?")
    assert "tokens/s" in chat.say("/stats")
    chat.child.send("\x03")
    chat.child.expect_exact("Ctrl-D or /exit leaves")
    chat.child.expect_exact(PROMPT)
    chat.child.send("half a question\x03")
    chat.child.expect_exact(PROMPT)
    chat.child.send("\x04")
    assert chat.end() == 0
    chat.child.close(force=True)


def test_errors_do_not_end_the_session(session):
    assert "context window" in session.say("x " * 400)
    assert "error" not in session.say("Hello")


def test_answers_can_go_to_a_file_while_the_terminal_asks(built, tmp_path):
    answers = tmp_path / "answers"
    command = [*PROGRAM, str(built), "--temperature", "0", "--max-tokens", "5"]
    child = pexpect.spawn(
        "sh",
        ["-c", f"{shlex.join(command)} > {shlex.quote(str(answers))}"],
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"},
    )
    child.expect_exact(">>>")
    child.send("Hello\r")
    child.expect_exact("cut off at the length limit")
    child.send("\x04")
    child.expect(pexpect.EOF)
    asked = subprocess.run([*command, "--prompt", "Hello"], capture_output=True, check=True)
    assert answers.read_bytes() == asked.stdout


def test_inputs_are_remembered_for_the_next_session(session, built, tmp_path):
    session.say("a rare question")
    session.child.send("\x04")
    assert session.end() == 0
    assert "a rare question" in (tmp_path / "mlcawq" / "chat_history").read_text()


def test_json_needs_a_prompt(built, tmp_path):
    child = pexpect.spawn(
        PROGRAM[0], [*PROGRAM[1:], str(built), "--json"], encoding="utf-8", timeout=60
    )
    child.expect_exact("--json goes with --prompt")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2
