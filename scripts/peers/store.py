"""Measurements that are kept: a line of JSON each, found by a digest of all they depend on."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlcawq.evaluate.metrics import RUN, Estimate, estimate


@dataclass(frozen=True)
class Score:
    """How far a quantized model is from the original; divergences in nats.

    kl_runs: mean divergence over every run of `RUN` tokens, for paired differences. tokens: how
        many tokens those are in all; the last run may be shorter.
    """

    perplexity: float
    reference_perplexity: float
    top1: float
    kl_runs: tuple[float, ...]
    tokens: int

    @classmethod
    def of(cls, kl: np.ndarray, perplexity: float, reference: float, top1: float) -> Score:
        """kl: the divergence at every token [N]."""
        runs = [float(kl[start : start + RUN].mean()) for start in range(0, len(kl), RUN)]
        return cls(perplexity, reference, top1, tuple(runs), len(kl))

    @property
    def kl(self) -> np.ndarray:
        """As if every token of a run diverged equally [N]: means and errors stay what they are."""
        lengths = np.full(len(self.kl_runs), RUN)
        lengths[-1] = self.tokens - RUN * (len(self.kl_runs) - 1)
        return np.repeat(np.array(self.kl_runs), lengths)

    @property
    def millinats(self) -> Estimate:
        """Mean divergence and its standard error, in millinats a token."""
        return estimate(1e3 * self.kl)


@dataclass(frozen=True)
class Cell:
    """One method at one width on one model, measured or to be.

    setting: digest of the checkpoint, calibration tokens, scored tokens, width, groups and method.
    version: digest and name of the software that quantizes.
    """

    model: str
    variant: str
    bits: int
    method: str
    ours: bool
    setting: str
    version: str
    release: str


@dataclass(frozen=True)
class Result:
    """What became of a cell: a score and the seconds that quantizing took, or why there is none."""

    cell: Cell
    seconds: float = 0.0
    score: Score | None = None
    reason: str = ""


class Store:
    """Results in one file, to which several processes may append at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, result: Result) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(asdict(result)) + "\n")

    def results(self) -> list[Result]:
        """All of them, oldest first."""
        if not self._path.is_file():
            return []
        return [_result(json.loads(line)) for line in self._path.read_text().splitlines()]

    def find(self, cell: Cell, *, any_version: bool = False) -> Result | None:
        """The newest result of a cell; `any_version`: or of another version where there is none."""
        of_setting = [found for found in self.results() if found.cell.setting == cell.setting]
        current = [found for found in of_setting if found.cell.version == cell.version]
        for found in (current, of_setting if any_version else []):
            if found:
                return found[-1]
        return None


def _result(content: dict[str, Any]) -> Result:
    score = content["score"]
    if score is not None:
        score = Score(**{**score, "kl_runs": tuple(score["kl_runs"])})
    return Result(Cell(**content["cell"]), content["seconds"], score, content["reason"])
