"""`mlcawq chat`: talk to a built model, or ask it one thing."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlcawq.cli.streaming import show
from mlcawq.errors import UserError

if TYPE_CHECKING:
    from mlcawq.engine.session import ChatSession

# Ctrl-C waits for the pass that is running: on a slow CPU this is the longest wait.
_CHUNK_SIZE = 128
_OWN_DEFAULT = "  [default: the model's]"


def chat(
    folder: Annotated[Path, typer.Argument(help="A folder made by `mlcawq build` or mlc_llm.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Ask this once, print the answer, exit. '-' reads stdin."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message." + _OWN_DEFAULT)
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, vulkan, …")
    ] = "auto",
    library: Annotated[
        Path | None,
        typer.Option("--library", help="Compiled library, when it is not in the folder."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy." + _OWN_DEFAULT)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Keep the likeliest tokens up to this sum." + _OWN_DEFAULT),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Keep so many tokens; 0: all." + _OWN_DEFAULT)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Keep this fraction of the top probability." + _OWN_DEFAULT),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1: against repetition." + _OWN_DEFAULT),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", help="Against tokens used before." + _OWN_DEFAULT),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="Against tokens used often." + _OWN_DEFAULT),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same answer.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the answer before this text. Repeatable."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Length of an answer.  [default: what the context has]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Of the CPU.  [default: one for each physical core]"),
    ] = None,
    weights: Annotated[
        Literal["auto", "mapped", "resident"],
        typer.Option(
            "--weights",
            help="On the CPU: mapped leaves them in their files, resident reads them into huge "
            "pages (faster, takes their size in memory), auto does so, behind the first tokens, "
            "where memory is plentiful.",
        ),
    ] = "auto",
    json_output: Annotated[
        bool, typer.Option("--json", help="With --prompt: one JSON document on stdout.")
    ] = False,
) -> None:
    """Talk to a built model; with --prompt or piped input, ask it one thing.

    One-shot, stdout carries the answer and nothing else. A session has commands (/help lists
    them); Ctrl-C stops an answer, Ctrl-D leaves.
    """
    one_shot = prompt is not None or sys.stdin is None or not sys.stdin.isatty()
    if json_output and not one_shot:
        raise typer.BadParameter("--json goes with --prompt or piped input")

    from mlcawq.engine.runtime_only import without_blas_threads

    without_blas_threads()
    from mlcawq.engine.sampling import SamplingParams

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character gets a question mark, and the answer goes on.
        sys.stdout.reconfigure(errors="replace")
    options = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "max_tokens": max_tokens,
    }
    SamplingParams().override(**options)  # wrong values are reported before anything is loaded
    if system is not None:
        with _as_text("the system message"):
            system.encode()
    text = _one_prompt(prompt) if one_shot else ""

    started = time.perf_counter()
    session = _load(
        folder,
        {"device": device, "library": library, "threads": threads, "weights": weights},
        options,
        system,
        quiet=one_shot,
    )
    if one_shot:
        _ask_once(session, text, time.perf_counter() - started, json_output)
    else:
        from mlcawq.cli.chat_repl import run_repl

        run_repl(session)


def _one_prompt(prompt: str | None) -> str:
    with _as_text("the prompt"):
        if prompt not in (None, "-"):
            text = str(prompt)
        else:  # stdin is None where whoever started this has closed it
            text = sys.stdin.read().removesuffix("\n") if sys.stdin is not None else ""
        text.encode()
    if not text:
        raise UserError.one("the prompt is empty", fix="give --prompt TEXT, or text on stdin")
    return text


@contextmanager
def _as_text(what: str) -> Iterator[None]:
    """Bytes of the command line that are no UTF-8 are lone surrogates here, and fail to encode."""
    try:
        yield
    except UnicodeError:
        raise UserError.one(
            f"{what} is not valid UTF-8 text", fix="convert it, for example with iconv"
        ) from None


def _load(
    folder: Path,
    machine: dict[str, Any],
    options: dict[str, Any],
    system: str | None,
    *,
    quiet: bool,
) -> ChatSession:
    """The engine with one conversation; what the user should know of it goes to stderr."""
    from mlcawq.engine.opening import open_engine

    if not quiet:
        print(f"loading {folder} …", file=sys.stderr)
    engine = open_engine(folder, **machine, max_batch=1, chunk_size=_CHUNK_SIZE)
    from mlcawq.engine.session import ChatSession

    session = ChatSession(engine, engine.default_params.override(**options))
    if session.is_plain:
        engine.notes.append("this model has no chat template: it continues your text as it stands")
    if system is not None:
        session.set_system(system)
    for note in engine.notes:
        print(f"note: {note}", file=sys.stderr)
    return session


def _ask_once(session: ChatSession, prompt: str, load_seconds: float, as_json: bool) -> None:
    answer, reason = show(session.ask(prompt), sys.stdout.write if not as_json else None)
    stats = session.last
    if as_json and stats is not None:
        document = {
            "answer": answer,
            "finish_reason": reason,
            "usage": {
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "completion_tokens": stats.completion_tokens,
                "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            },
            "timings": {
                "load_seconds": load_seconds,
                "prefill_seconds": stats.prefill_seconds,
                "decode_seconds": stats.decode_seconds,
                "prefill_tokens_per_second": stats.prefill_tokens_per_second,
                "decode_tokens_per_second": stats.decode_tokens_per_second,
            },
            "threads": session.engine.threads,
            "weights": session.engine.weights,
            "sampling": asdict(session.params),
            "model": str(session.engine.folder),
            "device": session.engine.device,
        }
        print(json.dumps(document, ensure_ascii=False, indent=2))
    elif not as_json and not answer.endswith("\n"):
        print(flush=True)
    if reason == "length":
        print("note: the answer was cut off at its length limit", file=sys.stderr)
    if reason == "interrupted":
        raise KeyboardInterrupt
