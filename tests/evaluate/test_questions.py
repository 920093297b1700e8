"""Reading questions, and the greedy answers of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlcawq.errors import UserError
from mlcawq.evaluate.questions import Question, ask, open_answerer, read_questions


class Parrot:
    """Answers last question first, with spaces around."""

    def answers(self, questions: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        for i in reversed(range(len(questions))):
            yield i, f" {questions[i]}\n"


def test_answers_find_their_questions() -> None:
    found = ask(Parrot(), [Question("a", "a"), Question("b", "a"), Question("c", "c")], 5)
    assert [answer.right for answer in found] == [True, False, True]


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n{"question": "a"}\nnot json\n[1]\n')
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert [problem.where.rpartition(" ")[2] for problem in error.value.problems] == ["3", "4", "5"]


def test_lines_end_with_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\ufeff{"question": "a\u2028b", "answer": "c"}\r\n', encoding="utf-8")
    assert read_questions(path) == [Question("a\u2028b", "c")]


def test_a_file_without_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="no questions"):
        read_questions(path)
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")


def test_checkpoint_answers_are_the_greedy_ones(tiny_llama: Path) -> None:
    questions = ["What is 2 + 2?", "Paris?", "Name a fox.", "Berlin"]
    found = dict(open_answerer(tiny_llama, "checkpoint").answers(questions, 12))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for i, question in enumerate(questions):
        ids = tokenizer.encode(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        )
        prompt = len(ids)
        while len(ids) < prompt + 12:  # no cache, no generate(): the whole text every time
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert found[i] == tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_a_checkpoint_without_chat_template_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    for file in tiny_llama.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template"):
        open_answerer(tmp_path, "checkpoint")
