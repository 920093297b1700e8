"""Cutting a text into windows, and telling two vocabularies apart."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mlcawq.errors import UserError
from mlcawq.evaluate.text import cut_windows, open_tokenizer, read_text, vocabulary_problems


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    windows = cut_windows(range(23), window=5, longest=100)
    assert windows.dtype == np.int64
    assert windows.tolist() == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]


@pytest.mark.parametrize(
    ("tokens", "longest", "length"), [(5000, 9000, 2048), (5000, 512, 512), (300, 512, 300)]
)
def test_default_window(tokens: int, longest: int, length: int) -> None:
    assert cut_windows(range(tokens), window=None, longest=longest).shape[1] == length


def test_max_tokens_limits_the_text() -> None:
    assert cut_windows(range(100), window=10, longest=50, max_tokens=39).shape == (3, 10)


def test_a_window_longer_than_model_and_text_names_both() -> None:
    with pytest.raises(UserError) as error:
        cut_windows(range(30), window=100, longest=50, where="a.txt")
    assert "50" in error.value.problems[0].what
    assert "30 tokens are fewer than one window of 100" in error.value.problems[1].what


def test_one_token_is_no_text() -> None:
    with pytest.raises(UserError, match="only 1 token"):
        cut_windows([3], window=None, longest=50)


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no such")]
)
def test_unusable_text_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(path)


def test_wikitext2_is_joined_as_the_papers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*arguments: object, split: str) -> list[dict[str, str]]:
        asked.append((*arguments, split))
        return [{"text": ""}, {"text": " = Title = \n"}, {"text": " Words . \n"}]

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert read_text("wikitext2") == "\n\n = Title = \n\n\n Words . \n"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


def test_wikitext2_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hub-data") as caught:
        read_text("wikitext2")
    assert caught.value.problems[0].fix.endswith("or give a text file with --text")


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext2").write_text("mine")
    assert read_text("wikitext2") == "mine"


def test_vocabularies_are_compared_token_by_token(tiny_llama: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    names = sorted(vocabulary)[:2]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    one, other = open_tokenizer(tiny_llama), open_tokenizer(tmp_path)
    assert vocabulary_problems(one, open_tokenizer(tiny_llama), "") == []
    assert "differ in 2 tokens" in vocabulary_problems(one, other, "")[0].what


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        open_tokenizer(tmp_path)
