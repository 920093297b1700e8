"""Likelihoods of continuations against a plain sum, one by one, without filling or batching."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from mlcawq.evaluate.continuations import Continuation, likelihoods
from mlcawq.evaluate.greedy import continue_text, named_tokens, open_continuer, tokenizer_token
from mlcawq.evaluate.scorers import open_scorer
from mlcawq.evaluate.text import open_tokenizer


@pytest.fixture(scope="module")
def whole(tiny_llama: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def _asked(seed: int = 0) -> list[Continuation]:
    generator = np.random.default_rng(seed)
    sizes = ((1, 1), (5, 3), (62, 2), (63, 2), (130, 40), (1, 0), (5, 3))
    return [
        Continuation(*(generator.integers(3, 400, size).tolist() for size in pair))
        for pair in sizes
    ]


@torch.no_grad()
def test_likelihoods_are_those_of_transformers(
    tiny_llama: Path, whole: AutoModelForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlcawq.evaluate.continuations.rows_at_once", lambda vocab: 20)
    seen: list[tuple[int, int]] = []
    found = likelihoods(
        open_scorer(tiny_llama, "checkpoint"), _asked(), lambda *counts: seen.append(counts)
    )
    for one, asked in zip(found, _asked(), strict=True):
        ids = torch.tensor([[*asked.context, *asked.tokens]])
        log_probs = whole(ids).logits[0].log_softmax(-1)[len(asked.context) - 1 : -1]
        wanted = torch.tensor(asked.tokens, dtype=torch.long)
        expected = log_probs[: len(wanted)].gather(-1, wanted[:, None]).sum()
        assert one.log_probability == pytest.approx(float(expected), abs=1e-3)
    assert seen[-1] == (7, 7)


@torch.no_grad()
def test_greedy_is_told(tiny_llama: Path, whole: AutoModelForCausalLM) -> None:
    context = [5, 6, 7]
    answer: list[int] = []
    for _ in range(3):
        ids = torch.tensor([context + answer])
        answer.append(int(whole(ids).logits[0, -1].argmax()))
    other = [*answer[:2], (answer[2] + 1) % 400]
    scorer = open_scorer(tiny_llama, "checkpoint")
    found = likelihoods(scorer, [Continuation(context, answer), Continuation(context, other)])
    assert [one.greedy for one in found] == [True, False]

    continuer = open_continuer(tiny_llama, "checkpoint", "auto", 64)
    source = continuer.tokens(context)
    assert [next(source) for _ in range(3)] == answer


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    scorer = open_scorer(make_tiny_model(tmp_path / "model", context=32), "checkpoint")
    context, tokens = list(range(10, 60)), [7, 8]
    whole, cut = likelihoods(
        scorer, [Continuation(context, tokens), Continuation(context[-30:], tokens)]
    )
    assert whole.log_probability == pytest.approx(cut.log_probability, abs=1e-5)


class _Scripted:
    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def tokens(self, prompt: object) -> object:
        return iter(self._ids)


def test_a_continuation_ends_where_it_should(tiny_llama: Path) -> None:
    tokenizer = open_tokenizer(tiny_llama)
    ids = tokenizer.encode("one two. three\nfour", special=False)
    end = named_tokens(tiny_llama, "eos", tokenizer)[0]

    def said(ids: list[int], until: list[str], most: int) -> str:
        model = _Scripted(ids)
        return continue_text(  # type: ignore[arg-type]
            model, tokenizer, [1], until=until, ends=[end], max_new_tokens=most
        )

    assert said(ids, ["\n", "four"], 100) == "one two. three"
    assert said([*ids[:3], end, *ids], [], 100) == tokenizer.decode(ids[:3])
    assert said(ids, ["absent"], 2) == tokenizer.decode(ids[:2])


def test_the_tokenizer_names_its_tokens_first(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    tokenizer = open_tokenizer(folder)
    vocabulary = tokenizer.vocabulary()
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": [7, vocabulary["<|im_end|>"]], "bos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert named_tokens(folder, "eos", tokenizer) == [vocabulary["<|im_end|>"], 7]
    assert named_tokens(folder, "bos", tokenizer) == [5]
    assert tokenizer_token(folder, "bos", tokenizer) is None
