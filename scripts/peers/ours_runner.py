"""mlcawq doing the jobs of autoawq_runner.py, in a process of its own, so that time and memory are
measured alike.

    python ours_runner.py JOB.json
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mlcawq.quantize.calibration import CalibrationData
from mlcawq.quantize.pipeline import quantize_checkpoint
from mlcawq.quantize.progress import Silent
from mlcawq.quantize.recipe import load_recipe
from mlcawq.quantize.report import BlockReport


class _Stopwatch(Silent):
    """Times and resident memory between blocks."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.rss_mib: list[float] = []

    def _note(self) -> None:
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss_mib.append(pages * resource.getpagesize() / 2**20)

    def started(self, blocks: int, finished: int) -> None:
        self._note()

    def block_done(self, report: BlockReport) -> None:
        self._note()


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize job["model"] by the recipe job["method"] on the windows of job["tokens"].

    "overrides" replace keys of the recipe.
    The folder job["out"] holds AWQ storage, or the dequantized weights with "pack" false.
    """
    windows = tuple(torch.tensor(window) for window in job["tokens"])
    grid = {"bits": job["bits"], "group_size": job["group_size"]}
    recipe = load_recipe(job["method"], {**grid, **job.get("overrides", {})})
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        quantize_checkpoint(
            Path(job["model"]),
            Path(job.get("out") or Path(scratch) / "out"),
            recipe,
            CalibrationData(windows, windows[:1], "given tokens", held_out_is_seen=True),
            fmt="awq" if job.get("pack", True) else "fake",
            progress=watch,
        )
    times = watch.times
    return {
        "seconds": times[-1] - times[0],
        "cpu_seconds": watch.cpu_times[-1] - watch.cpu_times[0],
        "block_seconds": [after - before for before, after in itertools.pairwise(times)],
        "block_rss_mib": watch.rss_mib[1:],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(quantize(job)))


if __name__ == "__main__":
    main()
