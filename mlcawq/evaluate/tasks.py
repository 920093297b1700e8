"""Tasks of lm-evaluation-harness: what can be asked, and what came out."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.evaluate.folders import Kind


@dataclass(frozen=True)
class TaskRequest:
    """names: of tasks or groups of the harness. folder: where further tasks' YAML files lie.

    limit: only so many documents of each. few_shot: examples before each, None for the task's own.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    few_shot: int | None = None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; higher is better where `higher` is true, None where unknown."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    documents: int | None
    higher: bool | None


class Tasks:
    """The tasks of a request, loaded with their data and known to be there.

    Raises UserError where the harness is not installed, a task is unknown or its data is out of
    reach.
    """

    def __init__(self, request: TaskRequest) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise UserError.one(
                "tasks are those of lm-evaluation-harness, which is not installed",
                "--tasks",
                "pip install 'mlcawq[lm-eval]'",
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every default it takes
        if request.folder is not None and not request.folder.is_dir():
            raise UserError.one("no such folder", str(request.folder), "check --task-folder")
        self._request = request
        self._manager = TaskManager(include_path=request.folder and str(request.folder))
        raise_all(self._unknown())
        try:
            self._manager.load_task_or_group(list(request.names))
        except Exception as error:  # network, hub and YAML errors of several libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError.one(
                f"could not be loaded ({reason})",
                f"--tasks {','.join(request.names)}",
                "check the network and the tasks' files",
            ) from None

    def _unknown(self) -> Iterator[Problem]:
        known = self._manager.all_tasks
        for name in self._request.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                fix = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks names all"
                yield Problem(f"no task {name!r}", "--tasks", fix)

    def run(
        self,
        folder: Path,
        kind: Kind,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[TaskScore]:
        """Ask a model all of them."""
        from lm_eval import simple_evaluate

        from mlcawq.evaluate.harness import HarnessModel

        results = simple_evaluate(
            HarnessModel(folder, kind, device, progress),
            tasks=list(self._request.names),
            task_manager=self._manager,
            num_fewshot=self._request.few_shot,
            limit=self._request.limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert results is not None  # None is for ranks other than the first
        return list(_scores(results))


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    """The harness keeps "acc,none" and "acc_stderr,none" beside names and aliases."""
    for task, metrics in results["results"].items():
        documents = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, comma, selection = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{selection}")
            yield TaskScore(
                task,
                metric if selection == "none" else f"{metric}, {selection}",
                float(value),
                float(error) if isinstance(error, int | float) else None,
                documents,
                results.get("higher_is_better", {}).get(task, {}).get(metric),
            )
