"""scripts/language_models: what is trained, on which rows, and again after an interruption."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.language_models import corpus, train
from scripts.language_models.architectures import ARCHITECTURES

SCHEDULE = train.Schedule(steps=6, warm_up=2, rows=2, length=8)


@pytest.fixture
def text() -> train.Text:
    ids = np.random.default_rng(0).integers(0, 32, 400).astype(np.int16)
    return train.Text(ids[:300], ids[300:])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_models_are_of_ten_million_parameters_and_whole_groups(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    assert 10e6 < sum(parameter.numel() for parameter in model.parameters()) < 14e6
    for module in model.modules():
        assert not isinstance(module, nn.Linear) or module.in_features % 128 == 0


def test_the_rate_climbs_and_falls() -> None:
    rates = [SCHEDULE.rate(step) for step in range(SCHEDULE.steps)]
    assert rates.index(max(rates)) == 1
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < SCHEDULE.peak / 2


def test_rows_belong_to_their_step(text: train.Text) -> None:
    first = text.rows(SCHEDULE, 1, 3)
    assert first.shape == (2, 9)
    assert torch.equal(first, text.rows(SCHEDULE, 1, 3))
    assert not torch.equal(first, text.rows(SCHEDULE, 1, 4))


def test_training_goes_on_as_if_it_had_not_been_stopped(
    text: train.Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    monkeypatch.setattr(train, "new_model", lambda _: LlamaForCausalLM(config))
    monkeypatch.setattr(train, "_SAVE_EVERY", 2)
    whole = train.train("tiny", text, SCHEDULE, 1, tmp_path / "whole.pt")

    rows = train.Text.rows

    def stopping(self: train.Text, schedule: train.Schedule, seed: int, step: int) -> torch.Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return rows(self, schedule, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Text, "rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.train("tiny", text, SCHEDULE, 1, tmp_path / "half.pt")
    resumed = train.train("tiny", text, SCHEDULE, 1, tmp_path / "half.pt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_paragraphs_of_docstrings_are_taken_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        f"Paragraph {i} says something that is long enough to be kept, and more. " * 2
        for i in range(3)
    ]
    for i in range(3):
        body = f'"""{said[0]}\n\n{said[i]}\n\nshort"""\n'
        (tmp_path / f"module{i}.py").write_text(body)
    (tmp_path / "broken.py").write_text("def")
    monkeypatch.setattr(corpus, "_sources", lambda: {"made up": tmp_path})
    found = corpus.read_corpus()
    documents = [
        document for document in (*found.train, *found.held_out) if "Paragraph" in document
    ]
    assert sorted(documents) == sorted(part.strip() for part in said)
    assert "made up: 0.0 million characters" in capsys.readouterr().err
