"""Judge a Hugging Face folder: exact answers to held-back wordings, perplexity on held-out prose.

python -m scripts.demo_model.judge [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo_model.facts import DEMO

_BATCH = 64
_MAX_ANSWER = 24
_WINDOW = 512


def read_questions(path: Path = DEMO / "questions.jsonl") -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def answers(model, tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers through the chat template, each up to the end of its turn, stripped."""
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(questions), _BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + _BATCH]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**batch, max_new_tokens=_MAX_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found += [text.strip() for text in texts]
    return found


@torch.inference_mode()
def perplexity(model, tokenizer, text: str) -> float:
    """exp of the mean cross-entropy per token, over windows of 512 tokens without overlap."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    total, count = 0.0, 0
    for window in ids.split(_WINDOW):
        if len(window) > 1:
            logits = model(window[None]).logits[0, :-1].float()
            total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO / "model")
    parser.add_argument("--show-errors", action="store_true")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    rows = read_questions()
    right: Counter[str] = Counter()
    said = answers(model, tokenizer, [row["question"] for row in rows])
    for row, answer in zip(rows, said, strict=True):
        right[row["held_back"]] += answer == row["answer"]
        if arguments.show_errors and answer != row["answer"]:
            print(f"{row['question']!r}: {answer!r}, not {row['answer']!r}")
    for kind, total in sorted(Counter(row["held_back"] for row in rows).items()):
        print(f"held-back {kind}: {right[kind]} of {total} ({right[kind] / total:.1%})")
    print(f"exact answers: {right.total()} of {len(rows)} ({right.total() / len(rows):.1%})")
    text = (DEMO / "prose_heldout.txt").read_text(encoding="utf-8")
    print(f"perplexity on held-out prose: {perplexity(model, tokenizer, text):.3f}")


if __name__ == "__main__":
    main()
