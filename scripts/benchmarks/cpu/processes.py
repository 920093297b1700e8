"""The contenders' processes, seen from the one that asks them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

_SCRIPT = Path(__file__).with_name("worker.py")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS")


class WorkerError(RuntimeError):
    """A contender could not do what it was asked for; the message is its own."""


class Worker:
    """See worker.py for `kind` and `options`. log: where its stderr goes.

    started: the machine's monotonic clock before the process was there.
    """

    def __init__(self, python: Path, kind: str, options: dict[str, Any], log: Path) -> None:
        threads = str(options["threads"])
        self._log = log.open("w")
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [str(python), str(_SCRIPT), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **dict.fromkeys(_THREADS, threads)},
        )

    def ask(self, do: str, *, limit: float = 600.0, **arguments: Any) -> Any:
        """The answer. Raises WorkerError, also when there is none within `limit` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self.close()
            raise WorkerError(f"took more than {limit:.0f} s for {do}")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    @property
    def cpu_seconds(self) -> float:
        """That the process has computed since it was started; 0 when it is gone."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._process.wait()
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines() or ["nothing"]
        return f"died (status {self._process.returncode}); last it said: {lines[-1]}"


class Onlookers:
    """How much of the machine others took while the workers computed: what an idle one has not."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        self._workers = list(workers)
        self._before = self._now()

    def share(self) -> float:
        """Since this object was made, of all processors' time."""
        own, busy, every = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        return max(busy - own, 0.0) / every if every > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        every = sum(fields)
        idle = fields[3] + fields[4]
        tick = os.sysconf("SC_CLK_TCK")
        own = sum(worker.cpu_seconds for worker in self._workers)
        own += sum(os.times()[:4])
        return own, (every - idle) / tick, every / tick
