"""One contender in a process of its own: answers a line of JSON on stdin with one on stdout.

    python worker.py KIND OPTIONS      (JSON: "threads", and what the contender's class takes)

What is timed is the same for all: token ids in, float32 logits of the last token out. No sampling,
no text. The process may run on as many processors as it has threads, so that nobody is helped by
a thread that he was not given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

_CHUNK = 512  # tokens at most in a prefill that is not timed


class Model(Protocol):
    """A model with room for one sequence."""

    def forget(self, kept: int, dropped: int) -> None:
        """Leave the first `kept` tokens in the cache and drop the `dropped` after them."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append int32 ids; the logits after the last, float32 [V]."""

    def decode(self, token: int) -> np.ndarray:
        """Append one token; the logits after it, float32 [V]."""

    def facts(self) -> dict[str, Any]:
        """What the project says of itself."""


class Session:
    """A model and what of it is measured."""

    def __init__(self, model: Model, vocabulary: int) -> None:
        self._model, self._length = model, 0
        self._random = np.random.default_rng(1).integers(0, vocabulary, 2**16).astype(np.int32)

    def facts(self) -> dict[str, Any]:
        return self._model.facts()

    def prefill(self, tokens: int) -> float:
        """Seconds that a prompt of `tokens` takes in an empty cache."""
        self._keep(0)
        start = time.perf_counter()
        self._model.prefill(self._random[:tokens])
        seconds = time.perf_counter() - start
        self._length = tokens
        return seconds

    def decode(self, context: int, tokens: int) -> float:
        """Mean seconds of a token, of `tokens` that follow `context` others."""
        self._fill(context)
        self._decode(2)  # pages and caches as in the middle of a sentence
        self._keep(context)
        start = time.perf_counter()
        self._decode(tokens)
        seconds = (time.perf_counter() - start) / tokens
        self._keep(context)
        return seconds

    def first(self, tokens: int) -> float:
        """The monotonic clock of the machine when the first token after a prompt is known."""
        int(np.argmax(self._model.prefill(self._random[:tokens])))
        self._length = tokens
        return time.monotonic()

    def logits(self, tokens: int, file: str) -> None:
        """Write the logits after a prompt and after each of three more tokens, float32 [4, V]."""
        self._keep(0)
        # Copied one by one: some hand out the same buffer each time.
        rows = [self._model.prefill(self._random[:tokens]).copy()]
        for token in self._random[tokens : tokens + 3]:
            rows.append(self._model.decode(int(token)).copy())
        self._length = tokens + 3
        np.save(file, np.stack(rows))

    def memory(self) -> dict[str, int]:
        return memory()

    def _fill(self, context: int) -> None:
        self._keep(min(self._length, context))
        while self._length < context:
            end = min(self._length + _CHUNK, context)
            self._model.prefill(self._random[self._length : end])
            self._length = end

    def _keep(self, kept: int) -> None:
        self._model.forget(kept, self._length - kept)
        self._length = kept

    def _decode(self, tokens: int) -> None:
        for token in self._random[self._length : self._length + tokens]:
            self._model.decode(int(token))
        self._length += tokens


def memory() -> dict[str, int]:
    """Bytes of this process: peak, anonymous, of files that are mapped."""
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "files"}
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {names[key]: int(value.split()[0]) * 1024 for key, value in pairs if key in names}


def load(kind: str, options: dict[str, Any]) -> Any:
    """A session of `kind`, or the reader of memory."""
    if kind == "bandwidth":
        from benchmarks.cpu.bandwidth import Reader

        return Reader(**options)
    vocabulary = options.pop("vocabulary")
    model: Model
    if kind == "engine":
        from benchmarks.cpu.engine_model import EngineModel

        model = EngineModel(**options)
    elif kind == "llamacpp":
        from benchmarks.cpu.llamacpp_model import LlamaCppModel

        model = LlamaCppModel(**options)
    else:
        from benchmarks.cpu.torch_model import TorchModel

        model = TorchModel(**options)
    return Session(model, vocabulary)


def processors(threads: int) -> set[int]:
    """As many of those that this process may use, no two of one core while there are others."""
    allowed = sorted(os.sched_getaffinity(0))

    def siblings(cpu: int) -> str:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return path.read_text() if path.exists() else str(cpu)

    first: dict[str, int] = {}
    for cpu in allowed:
        first.setdefault(siblings(cpu), cpu)
    ordered = [*first.values(), *(cpu for cpu in allowed if cpu not in first.values())]
    return set(ordered[:threads])


def serve(make: Callable[[], Any], lines: TextIO, answers: TextIO) -> None:
    """Answer until the lines end. What fails is answered too: {"error": ...}."""

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    session = None
    for line in lines:
        asked = json.loads(line)
        try:
            if session is None:
                session = make()
            answer({"result": getattr(session, asked.pop("do"))(**asked)})
        except Exception as error:  # another project's code may fail in any way
            text = str(error).strip().splitlines() or [""]
            answer({"error": f"{type(error).__name__}: {text[-1]}"})


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, processors(options["threads"]))
    # Libraries print; what they say goes to the log, the answers alone to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(lambda: load(kind, options), sys.stdin, answers)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
