"""The interactive session of `mlcawq chat`: reading lines, commands, printing."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.defaults import create_output

from mlcawq.cli.streaming import show
from mlcawq.engine.session import SETTINGS, ChatSession
from mlcawq.errors import UserError

if TYPE_CHECKING:
    from mlcawq.engine.engine import Delta

_PROMPT = ">>> "
_QUOTES = '"""'


def run_repl(session: ChatSession) -> None:
    """Ask and answer until /exit or Ctrl-D."""
    engine = session.engine
    _say(
        f"{engine.folder.resolve().name}: {engine.config['model_type']}, "
        f"{engine.config['quantization']}, on {engine.device}, "
        f"context {engine.context_window_size} tokens. /help for help."
    )
    commands = Commands(session)
    reader: PromptSession[str] = PromptSession(
        history=_history(),
        # Where stdout is a file for the answers, the terminal is on stderr.
        output=None if sys.stdout.isatty() else create_output(always_prefer_tty=True),
        key_bindings=_bindings(),
        multiline=True,
        prompt_continuation=lambda width, _number, _wrapped: "... ".rjust(width),
        completer=WordCompleter(commands.names(), sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            typed = reader.prompt(_PROMPT)
        except KeyboardInterrupt:
            if not reader.default_buffer.text:
                _say("(Ctrl-D or /exit leaves; Ctrl-C stops an answer)")
            continue
        except EOFError:
            return
        line = clean_input(typed)
        if not line.strip():
            continue
        try:
            if is_command(typed):
                if not commands.run(line.strip()):
                    return
            else:
                left_out = session.left_out
                print_answer(session.ask(line))
                if session.left_out > left_out:
                    _say(
                        f"(the context window is full: the model no longer sees the first "
                        f"{session.left_out // 2} questions and answers)"
                    )
        except UserError as error:
            _say(f"error: {error}")


def print_answer(deltas: Generator[Delta, None, None]) -> None:
    """Stream one answer to stdout, and say on stderr when it is not whole."""
    text, reason = show(deltas, sys.stdout.write)
    if not text.endswith("\n"):
        print(flush=True)
    if reason == "interrupted":
        _say("(stopped)" if text else "(stopped before the answer began)")
    elif reason == "length":
        _say("(cut off at the length limit)")


class Commands:
    """The slash commands. Each takes the rest of its line."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self._table: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "stats": ("", "speed and token counts of the last answer and in all", self._stats),
            "reset": ("", "forget the conversation", self._reset),
            "set": ("[KEY=VALUE]", "change a sampling setting, or show them all", self._set),
            "system": ("[TEXT]", "set the system message and start anew, or show it", self._system),
            "regen": ("", "answer the last question again", self._regen),
            "save": ("FILE", "write the conversation (.json, else Markdown)", self._save),
            "exit": ("", "leave (as does Ctrl-D)", self._help),
        }

    def names(self) -> list[str]:
        return [f"/{name}" for name in self._table]

    def run(self, line: str) -> bool:
        """Run one command line. False: leave the program."""
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("exit", "quit"):
            return False
        if name not in self._table:
            close = difflib.get_close_matches(name, self._table, 1, 0.5)
            guess = f"; did you mean /{close[0]}?" if close else ";"
            _say(f"unknown command /{name}{guess} /help lists the commands (// sends a slash)")
            return True
        self._table[name][2](rest.strip())
        return True

    def _help(self, _rest: str) -> None:
        rows = [(f"/{n} {usage}".rstrip(), what) for n, (usage, what, _) in self._table.items()]
        width = max(len(usage) for usage, _ in rows)
        for usage, what in rows:
            _say(f"  {usage.ljust(width)}  {what}")
        _say(
            f"  Several lines: end a line with \\, press Alt-Enter, or put {_QUOTES} around them.\n"
            "  Ctrl-C stops an answer; what it has said stays in the conversation."
        )

    def _stats(self, _rest: str) -> None:
        last, sums = self.session.last, self.session.totals
        if last is None:
            _say("nothing has been asked yet")
            return
        _say(
            f"last answer: prompt {last.prompt_tokens} tokens ({last.cached_tokens} from the "
            f"cache), prefill {last.prefill_tokens_per_second:.1f} tokens/s; answer "
            f"{last.completion_tokens} tokens, decode {last.decode_tokens_per_second:.1f} tokens/s"
        )
        computed = sums.prompt_tokens - sums.cached_tokens
        _say(
            f"in all: {sums.answers} answers, {computed} prompt tokens computed at "
            f"{_rate(computed, sums.prefill_seconds)}, {sums.cached_tokens} from the cache; "
            f"{sums.completion_tokens} answer tokens, decode "
            f"{_rate(sums.decoded_tokens, sums.decode_seconds)}"
        )

    def _reset(self, _rest: str) -> None:
        self.session.reset()
        _say("the conversation is forgotten")

    def _set(self, rest: str) -> None:
        if rest:
            name, value = self.session.set_option(rest)
            _say(f"{name} = {value!r}")
            return
        for name in SETTINGS:
            _say(f"  {name} = {getattr(self.session.params, name)!r}")

    def _system(self, rest: str) -> None:
        if rest:
            self.session.set_system(rest)
            _say("system message set; this is a new conversation")
            return
        text = self.session.system
        if text is None:
            text = self.session.engine.conversation.system_message
        _say(text or "(no system message)")

    def _regen(self, _rest: str) -> None:
        print_answer(self.session.regenerate())

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError.one("/save needs a file name", fix="write /save FILE")
        path = Path(os.path.expanduser(rest))  # Path's own fails for unknown users
        if path.suffix == ".json":
            text = json.dumps(self.session.messages(), ensure_ascii=False, indent=2) + "\n"
        else:
            text = self.session.transcript()
        try:
            with path.open("x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                except BaseException:
                    path.unlink()
                    raise
        except OSError as error:
            raise UserError.one(
                f"not written ({error.strerror})", str(path), "give another file name"
            ) from None
        _say(f"saved to {path}")


def clean_input(text: str) -> str:
    """What was meant by what was typed: without triple quotes, continuation marks, a slash before
    a slash, and with a question mark for pasted bytes that are no text.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    stripped = text.strip()
    if len(stripped) >= 2 * len(_QUOTES) and stripped.startswith(_QUOTES) and is_whole(text):
        return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    if stripped.startswith("//"):
        text = text.replace("//", "/", 1)
    return text.replace("\\\n", "\n")


def is_command(text: str) -> bool:
    """Does what was typed begin with one slash? Behind quotes or a second one it is a message."""
    return text.lstrip().startswith("/") and not text.lstrip().startswith("//")


def is_whole(text: str) -> bool:
    """Is the input finished when Enter is pressed after `text`?"""
    if text.lstrip().startswith(_QUOTES):
        return len(text.strip()) >= 2 * len(_QUOTES) and text.rstrip().endswith(_QUOTES)
    return not text.endswith("\\")


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _history() -> History:
    """Inputs of earlier sessions, in the XDG state folder; in memory where that is not writable."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "mlcawq" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return InMemoryHistory()
    return FileHistory(str(path))


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if seconds else "- tokens/s"


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
