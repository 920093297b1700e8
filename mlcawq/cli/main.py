"""The `mlcawq` program: which commands there are, and how an error reaches the user."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from mlcawq import __version__
from mlcawq.errors import UserError

# name -> (module, function, help line). A command's module is imported only when it runs, so
# that `mlcawq --help` does not wait for torch or TVM.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quantize": (
        "mlcawq.cli.quantize",
        "quantize",
        "Quantize a Hugging Face model to 4-bit AWQ.",
    ),
    "recipes": (
        "mlcawq.cli.recipes",
        "recipes",
        "The recipes of quantize, and what each does.",
    ),
    "repack": (
        "mlcawq.cli.repack",
        "repack",
        "Store a quantized model in another format, without calibrating again.",
    ),
    "build": (
        "mlcawq.cli.build",
        "build",
        "Build a checkpoint into a model folder that chats: the three steps below, verified.",
    ),
    "gen-config": (
        "mlcawq.cli.build",
        "gen_config",
        "Build, step 1: write mlc-chat-config.json and the tokenizer files.",
    ),
    "convert-weight": (
        "mlcawq.cli.build",
        "convert_weight",
        "Build, step 2: convert the weights to MLC's format.",
    ),
    "compile": (
        "mlcawq.cli.build",
        "compile_",
        "Build, step 3: compile the model library for a target.",
    ),
    "chat": ("mlcawq.cli.chat", "chat", "Talk to a built model."),
    "eval": (
        "mlcawq.cli.eval",
        "eval_",
        "Perplexity, KL divergence, exact answers and tasks of a checkpoint or a built model.",
    ),
    "compare": (
        "mlcawq.cli.compare",
        "compare",
        "Several quantized models side by side: cost, and distance from fp16.",
    ),
    "doctor": (
        "mlcawq.cli.doctor",
        "doctor",
        "What this machine and environment can do, and what to install for the rest.",
    ),
    "inspect": ("mlcawq.cli.inspect", "inspect", "What a model folder or library is."),
}

_DEBUG = "--debug"
# Errors of the system that are nobody's bug, wherever they come up, and what to do about them.
_REFUSALS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EACCES: "mend the permissions, or choose another place",
    errno.EPERM: "mend the permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "the disk or network drive may be failing; try a copy elsewhere",
}


def main() -> None:
    """Entry point of the console script. Exits 0, 1 (UserError), 2 (usage) or 130 (interrupt)."""
    arguments = [word for word in sys.argv[1:] if word != _DEBUG]
    debug = len(arguments) < len(sys.argv) - 1 or bool(os.environ.get("MLCAWQ_DEBUG"))
    try:
        with _noticing_interrupts():
            _app(arguments)(args=arguments, prog_name="mlcawq")
    except UserError as error:
        _fail(str(error), debug)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has gone: no more output, and no complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            place = error.filename or "writing the output"
            _fail(f"{place}: {error.strerror}\n  -> {_REFUSALS[error.errno]}", debug)
        _fail(
            f"unexpected {type(error).__name__}: {error}\n  -> this is a bug in mlcawq: run again "
            "with --debug and report the traceback",
            debug,
        )


@contextmanager
def _noticing_interrupts() -> Iterator[None]:
    """Ctrl-C leaves as KeyboardInterrupt, also where TVM was calling Python when it came: TVM hands
    on an error of its own, without a message.
    """
    before = signal.getsignal(signal.SIGINT)
    alone = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not alone:
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if received and isinstance(error, RuntimeError):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _app(arguments: list[str]) -> Callable[..., Any]:
    app = typer.Typer(
        help="Any Hugging Face language model as a 4-bit AWQ model that chats fast.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def _options(
        version: Annotated[
            bool,
            typer.Option("--version", callback=_print_version, is_eager=True, help="Show version."),
        ] = False,
        debug: Annotated[
            bool, typer.Option(_DEBUG, help="Show the traceback of an error.")
        ] = False,
    ) -> None: ...

    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, function, summary) in COMMANDS.items():
        command = getattr(importlib.import_module(module), function) if name == wanted else _listed
        app.command(name, help=None if name == wanted else summary, short_help=summary)(command)
    return app


def _listed() -> None:
    """Stands for a command that was not asked for: shown in the help, never run."""


def _print_version(value: bool) -> None:
    if value:
        print(f"mlcawq {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
