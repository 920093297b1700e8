"""Runs that alternate between contenders, only one of whom computes at a time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.cpu.contenders import OURS, Contender
from benchmarks.cpu.files import Files
from benchmarks.cpu.processes import Onlookers, Worker, WorkerError

PREFILL, START, CHAT = "prefill", "first token", "mlcawq chat"
_SETTLE = 0.05  # seconds for another contender's threads to stop spinning
_PROMPT = 32  # tokens of the prompt that start-up is measured with
_SLOW = 2.0  # seconds for a token, above which nothing more is asked
AGREEMENT = 0.7  # correlation of logits with the reference's: 4 bits give above 0.8, other models 0


def decode_at(context: int) -> str:
    """The name of a measure."""
    return f"decode at {context}"


@dataclass(frozen=True)
class Plan:
    """prompt: tokens of a prefill. contexts: tokens before those that are decoded, `tokens` in a
    run. repeats: runs of each that count, after one that does not. startups: processes started.
    """

    prompt: int
    contexts: tuple[int, ...]
    tokens: int
    repeats: int
    startups: int

    @property
    def capacity(self) -> int:
        """Tokens that every contender has room for: whole pages of 256, as llama.cpp takes them."""
        return -(-(max(self.prompt, *self.contexts) + self.tokens + 16) // 256) * 256

    @property
    def measures(self) -> dict[str, Mapping[str, Any]]:
        """What is asked of a worker, by the measure's name, in the order that refills least."""
        found: dict[str, Mapping[str, Any]] = {PREFILL: {"do": "prefill", "tokens": self.prompt}}
        for context in sorted(self.contexts):
            asked = {"do": "decode", "context": context, "tokens": self.tokens}
            found[decode_at(context)] = asked
        return found


@dataclass
class Outcome:
    """What was measured of one contender, in seconds: of a prefill, of a token, until the first.

    memory: bytes, as worker.memory. correlation: of its logits with the reference's.
    """

    contender: Contender
    runs: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    correlation: float | None = None
    refused: str = ""

    def seconds(self, measure: str) -> float | None:
        """The median run; None where there is none."""
        return median(self.runs[measure]) if self.runs.get(measure) else None


@dataclass
class Part:
    """One model on so many threads. bandwidth: bytes a second by the kind of pages, each run's.
    cached: elements of keys and values for a token. others: share of the machine that was somebody
    else's meanwhile.
    """

    model: str
    threads: int
    outcomes: list[Outcome]
    bandwidth: dict[str, list[float]]
    cached: int
    others: float = 0.0

    @property
    def best_bandwidth(self) -> float | None:
        return max((median(runs) for runs in self.bandwidth.values() if runs), default=None)

    def share(self, outcome: Outcome, context: int, tokens: int) -> float | None:
        """Of the bandwidth, that decoding reads weights and cache with."""
        seconds, bandwidth = outcome.seconds(decode_at(context)), self.best_bandwidth
        if seconds is None or bandwidth is None:
            return None
        entrant = outcome.contender
        cached = self.cached * entrant.cached_bytes * (context + tokens / 2)
        return (entrant.weight_bytes + cached) / seconds / bandwidth


class Bench:
    """say: told of progress. files: where logs go, and logits that are compared."""

    def __init__(self, plan: Plan, files: Files, say: Callable[[str], None]) -> None:
        self._plan, self._files, self._say = plan, files, say

    def measure(
        self, part: Part, reader: Contender | None, reference: Contender | None, check: bool
    ) -> None:
        """Fill `part`. reader: what measures bandwidth. check: compare logits with reference's."""
        workers: dict[int, Worker] = {}
        reading: Worker | None = None
        try:
            for i, outcome in enumerate(part.outcomes):
                self._say(f"{part.model}, {part.threads} threads: loading {outcome.contender.name}")
                worker = self.start(outcome.contender, part.threads)
                workers[i] = worker
                self._attempt(outcome, lambda w=worker, o=outcome: self._admit(w, o))
            if reader is not None:
                reading = self.start(reader, part.threads)
                reading.ask("read")
            if check:
                self._check(part, workers, reference)
            everybody = [*workers.values(), *([reading] if reading else [])]
            onlookers = Onlookers(everybody)
            for name, asked in self._plan.measures.items():
                self._alternate(part, workers, reading, name, asked)
            for i, outcome in enumerate(part.outcomes):
                if not outcome.refused:
                    outcome.memory = workers[i].ask("memory")
                    outcome.facts = workers[i].ask("facts")
            part.others = onlookers.share()
        finally:
            for worker in [*workers.values(), *([reading] if reading else [])]:
                worker.close()

    def start(self, contender: Contender, threads: int) -> Worker:
        options = {**contender.options, "threads": threads}
        if contender.kind != "bandwidth":
            options["capacity"] = self._plan.capacity
        return Worker(contender.python, contender.kind, options, self._files.log(contender.name))

    def start_up(self, part: Part) -> None:
        """Seconds from starting a process to the first token after a short prompt; of ours, also
        what a user waits for `mlcawq chat` to print one token and end.
        """
        for turn in range(self._plan.startups + 1):
            self._say(f"{part.model}, {part.threads} threads: start-up {turn}")
            for outcome in _rotated(part.outcomes, turn):
                self._attempt(outcome, lambda o=outcome, t=turn: self._start_once(part, o, t))

    def fastest(self, contenders: Sequence[Contender], threads: int) -> list[str]:
        """The names of those that win any measure: each on its own, the best of three runs."""
        best: dict[str, tuple[float, str]] = {}
        for contender in contenders:
            self._say(f"{threads} threads: trying {contender.name}")
            with self.start(contender, threads) as worker:
                try:
                    for name, asked in self._plan.measures.items():
                        seconds = min(worker.ask(**asked) for _ in range(4))
                        own = seconds, contender.name
                        best[name] = min(best.get(name, own), own)
                except WorkerError as error:
                    self._say(f"{contender.name}: {error}")
        return sorted({name for _, name in best.values()})

    def _admit(self, worker: Worker, outcome: Outcome) -> None:
        seconds = worker.ask("decode", context=1, tokens=1)
        if seconds > _SLOW:
            raise WorkerError(f"{1 / seconds:.2f} tokens/s from an empty cache: nothing more asked")

    def _check(self, part: Part, workers: dict[int, Worker], reference: Contender | None) -> None:
        """All compute one model: else a time of theirs would say nothing."""
        logits: dict[int, np.ndarray] = {}
        for i, outcome in enumerate(part.outcomes):
            file = self._files.log(outcome.contender.name).with_suffix(".npy")

            def compute(i: int = i, file: Path = file) -> None:
                workers[i].ask("logits", tokens=64, file=str(file))
                logits[i] = np.load(file).astype(np.float64)

            self._attempt(outcome, compute)
            file.unlink(missing_ok=True)
        right = next(
            (logits[i] for i, o in enumerate(part.outcomes) if o.contender == reference), None
        )
        if right is None:
            return
        for i, found in logits.items():
            outcome = part.outcomes[i]
            outcome.correlation = min(
                float(np.corrcoef(a, b)[0, 1]) for a, b in zip(found, right, strict=True)
            )
            if not outcome.correlation >= AGREEMENT:  # NaN is no agreement
                outcome.refused = f"computes something else: correlation {outcome.correlation:.2f}"

    def _alternate(
        self,
        part: Part,
        workers: dict[int, Worker],
        reading: Worker | None,
        name: str,
        asked: Mapping[str, Any],
    ) -> None:
        order = list(enumerate(part.outcomes))
        for turn in range(self._plan.repeats + 1):
            self._say(f"{part.model}, {part.threads} threads: {name}, run {turn}")
            for i, outcome in _rotated(order, turn):
                self._attempt(
                    outcome,
                    lambda i=i, o=outcome, t=turn: _keep(o, name, t, workers[i].ask(**asked)),
                )
                time.sleep(_SETTLE)
            if reading is not None and turn:
                for kind, speed in reading.ask("read").items():
                    part.bandwidth.setdefault(kind, []).append(speed)

    def _start_once(self, part: Part, outcome: Outcome, turn: int) -> None:
        with self.start(outcome.contender, part.threads) as worker:
            end = worker.ask("first", tokens=_PROMPT)
            _keep(outcome, START, turn, end - worker.started)
        if outcome.contender.project == OURS:
            _keep(outcome, CHAT, turn, chat_seconds(outcome.contender, part.threads))

    def _attempt(self, outcome: Outcome, action: Callable[[], None]) -> None:
        """What one contender cannot do the others still can."""
        if outcome.refused:
            return
        try:
            action()
        except WorkerError as error:
            outcome.refused = str(error)
            self._say(f"{outcome.contender.name}: {error}")


def chat_seconds(contender: Contender, threads: int) -> float:
    """Of the whole command, for a single token. Raises WorkerError where it fails."""
    command = [str(contender.python), "-m", "mlcawq", "chat", str(contender.weights)]
    command += ["--device", "cpu", "--threads", str(threads)]
    command += ["--weights", contender.options["weights"], "--prompt", "Hello", "--max-tokens", "1"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkerError(f"mlcawq chat: {' '.join(done.stderr.split())[-200:]}")
    return time.monotonic() - start


def _keep(outcome: Outcome, measure: str, turn: int, seconds: float) -> None:
    """The first turn fills caches: it does not count."""
    if turn:
        outcome.runs.setdefault(measure, []).append(seconds)


def _rotated(items: Sequence[Any], turn: int) -> list[Any]:
    """Nobody is always the first."""
    start = turn % len(items) if items else 0
    return [*items[start:], *items[:start]]
