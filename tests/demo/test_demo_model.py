"""The shipped demo model is a folder like any other, small, and knows its facts."""

from __future__ import annotations

import json
import random

import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from scripts.demo_model.chats import ChatSource  # noqa: E402
from scripts.demo_model.facts import (  # noqa: E402
    DEMO,
    held_back_questions,
    load_relations,
    normal_form,
    training_questions,
)
from scripts.demo_model.judge import answers, perplexity, read_questions  # noqa: E402

MODEL = DEMO / "model"
MEGABYTES = 10**6


@pytest.fixture(scope="module")
def relations():
    return load_relations()


@pytest.fixture(scope="module")
def questions():
    return read_questions()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_weights_are_small_and_half_precision(model):
    weights = list(MODEL.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 12 * MEGABYTES
    assert json.loads((MODEL / "config.json").read_text())["dtype"] == "float16"


def test_every_linear_can_be_quantized_in_groups_of_128(model):
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    assert {linear.in_features % 128 for linear in linears} == {0}


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "two\nlines\n\n and  spaces\t.",
        "naïve café — “quotes”, 12+34=46",
        "你好，世界 🙂 здравствуй",
        "\u0000\x7f bytes \ufffd",
    ],
)
def test_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_is_chatml_with_a_default_system_message(tokenizer):
    asked = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    told = [{"role": "system", "content": "Be brief."}, *asked]
    assert "helpful" not in tokenizer.apply_chat_template(told, tokenize=False)


def test_a_wording_has_one_answer(relations):
    answered: dict[str, str] = {}
    for relation in relations:
        templates = [
            *relation.templates,
            *relation.held_back_frames,
            *relation.held_back_templates,
        ]
        for fact in relation.facts:
            for template in templates:
                question = relation.ask(template, fact)
                known = answered.setdefault(normal_form(question.text), question.answer)
                assert known == question.answer, question


def test_questions_are_those_that_the_seed_gives(relations, questions):
    assert questions == held_back_questions(relations, random.Random(7))


def test_held_back_wordings_are_not_trained_on(relations, questions):
    assert len(questions) >= 300
    held_back = {normal_form(row["question"]) for row in questions}
    known = {normal_form(q.text): q.answer for r in relations for q in training_questions(r)}
    assert not held_back & known.keys()
    # What training draws, with its noise, is checked as well, as is the calibration text.
    rng = random.Random(0)
    source = ChatSource(relations)
    drawn = [turn.question for _ in range(20_000) for turn in source.turns(rng)]
    for line in (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
        for message in json.loads(line).get("messages", []):
            drawn.append(message["content"])
    assert not {normal_form(text) for text in drawn} & held_back


def test_every_held_back_question_asks_a_trained_fact(relations, questions):
    facts = {r.name: {f.answer for f in r.facts} for r in relations}
    assert all(row["answer"] in facts[row["relation"]] for row in questions)


def test_held_out_prose_is_in_no_book_of_the_training():
    passages = (DEMO / "prose_heldout.txt").read_text(encoding="utf-8").split("\n\n")
    books = "".join(p.read_text(encoding="utf-8") for p in (DEMO / "prose").glob("*.txt"))
    long = [passage for passage in passages if len(passage) > 60]
    assert len(long) > 50
    assert not [passage for passage in long if passage in books]


def test_answers_held_back_wordings(model, tokenizer, questions):
    asked = random.Random(3).sample(questions, 128)
    said = answers(model, tokenizer, [row["question"] for row in asked])
    right = sum(a == row["answer"] for a, row in zip(said, asked, strict=True))
    assert right >= 0.95 * len(asked)


def test_prose_is_modelled(model, tokenizer):
    text = (DEMO / "prose_heldout.txt").read_text(encoding="utf-8")
    assert perplexity(model, tokenizer, text[:6000]) < len(tokenizer) / 10
