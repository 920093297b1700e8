"""A built folder scores and answers as the checkpoint that it was built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from built_model import CHUNK, CONTEXT, built_tiny_llama

from mlcawq.errors import UserError
from mlcawq.evaluate.compare import score_windows
from mlcawq.evaluate.questions import open_answerer
from mlcawq.evaluate.run import Request, evaluate
from mlcawq.evaluate.scorers import open_scorer


@pytest.fixture(scope="module")
def folders() -> tuple[Path, Path]:
    return built_tiny_llama()


def test_a_built_float32_model_does_not_diverge(folders: tuple[Path, Path]) -> None:
    checkpoint, built = folders
    scorer = open_scorer(built, "built")
    assert scorer.label == "q0f32"
    assert scorer.longest == CONTEXT
    windows = np.random.default_rng(0).integers(0, 390, (3, 2 * CHUNK + 9))
    found = score_windows(scorer, windows, open_scorer(checkpoint, "checkpoint"))
    assert found.divergence is not None
    assert found.divergence.kl_max < 1e-6
    assert found.divergence.top1.mean == 1.0


@pytest.mark.parametrize("rows", [CHUNK - 5, CHUNK, CHUNK + 10])
def test_runs_are_cut_the_same_whatever_the_prefill_chunk(
    folders: tuple[Path, Path], rows: int
) -> None:
    windows = np.random.default_rng(1).integers(0, 390, (2, 100))
    runs = [
        list(open_scorer(folder, kind).logits(windows, rows))
        for folder, kind in zip(folders, ("checkpoint", "built"), strict=True)
    ]
    assert [len(run) for run in runs[0]] == [len(run) for run in runs[1]]
    for ours, expected in zip(runs[1], runs[0], strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_answers_are_those_of_the_checkpoint(folders: tuple[Path, Path]) -> None:
    questions = ["What is 2 + 2?", "Paris?", "Name a fox."]
    checkpoint, built = (
        dict(open_answerer(folder, kind).answers(questions, 10))
        for folder, kind in zip(folders, ("checkpoint", "built"), strict=True)
    )
    assert built == checkpoint


def test_a_device_that_is_not_there_is_seen_before_work(folders: tuple[Path, Path]) -> None:
    assert open_scorer(folders[1], "built", "cpu").label == "q0f32"
    for opening in (open_scorer, open_answerer):
        with pytest.raises(UserError, match="no library for cuda"):
            opening(folders[1], "built", "cuda")


def test_a_window_must_fit_into_both_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, built = folders
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    report = evaluate(Request(str(checkpoint), against=str(built), text=text))
    assert report.labels == ("float32", "q0f32")
    assert report.comparison is not None
    assert report.comparison.model.window == CONTEXT
    with pytest.raises(UserError, match=f"longer than the {CONTEXT}"):
        evaluate(Request(str(built), text=text, window=CONTEXT + 1))
