"""Tasks of lm-evaluation-harness, with a stand-in for it; the real one where it is installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from mlcawq.errors import UserError
from mlcawq.evaluate.run import Request, evaluate
from mlcawq.evaluate.tasks import TaskRequest, Tasks, TaskScore, _scores


def test_the_harness_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"mlcawq\[lm-eval\]"):
        Tasks(TaskRequest(("hellaswag",)))


class _Manager:
    all_tasks = ("hellaswag", "arc_easy")

    def __init__(self, include_path: str | None = None) -> None: ...

    def load_task_or_group(self, names: list[str]) -> None:
        if names == ["arc_easy"]:
            raise ConnectionError("no route to host")


@pytest.fixture
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = _Manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)


@pytest.mark.usefixtures("_stub")
def test_unknown_tasks_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        Tasks(TaskRequest(("helaswag", "arc_easy", "zzz")))
    first, second = caught.value.problems
    assert "helaswag" in first.what
    assert "hellaswag" in first.fix
    assert "zzz" in second.what


@pytest.mark.usefixtures("_stub")
def test_data_out_of_reach() -> None:
    with pytest.raises(UserError, match="no route to host"):
        Tasks(TaskRequest(("arc_easy",)))
    with pytest.raises(UserError, match="no such folder"):
        Tasks(TaskRequest(("hellaswag",), folder=Path("absent")))


def test_results_of_the_harness_are_read() -> None:
    results = {
        "results": {
            "arc": {
                "alias": " - arc",
                "name": "arc",
                "sample_len": 5,
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "perplexity,strict": 9.0,
                "perplexity_stderr,strict": "N/A",
            }
        },
        "n-samples": {"arc": {"original": 7, "effective": 5}},
        "higher_is_better": {"arc": {"acc": True}},
    }
    assert list(_scores(results)) == [
        TaskScore("arc", "acc", 0.5, 0.1, 5, True),
        TaskScore("arc", "perplexity, strict", 9.0, None, 5, None),
    ]


def test_real_tasks(tmp_path: Path, tiny_llama: Path) -> None:
    """All three kinds of request, on tasks of our own."""
    pytest.importorskip("lm_eval")
    rows = [{"text": "Water boils", "choices": ["a", " at 100"], "gold": 1}] * 2
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    kinds = {
        "multiple_choice": {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
        "loglikelihood_rolling": {"doc_to_target": "{{text}}"},
        "generate_until": {
            "doc_to_target": "{{choices[1]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        },
    }
    metrics = ("acc", "bits_per_byte", "exact_match")
    for (kind, options), metric in zip(kinds.items(), metrics, strict=True):
        task = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "" if kind == "loglikelihood_rolling" else "{{text}}",
            "metric_list": [{"metric": metric}],
            **options,
        }
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(task))
    wanted = TaskRequest(tuple(f"local_{kind}" for kind in kinds), tmp_path, limit=1)
    report = evaluate(Request(str(tiny_llama), tasks=wanted))
    assert {score.metric for score in report.tasks} == set(metrics)
    assert {score.documents for score in report.tasks} == {1}
