"""Chatting greedily with a Hugging Face checkpoint, in float32 on its dequantized weights.

Generation needs every block for every token, so here, unlike everywhere else, the whole model is
in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mlcawq.checkpoint.config import load_json
from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError

_BATCH = 32


def stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer, by generation_config.json, config.json or tokenizer."""
    found: set[int | None] = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            given = load_json(folder / name).get("eos_token_id")
            found.update(given if isinstance(given, list) else [given])
    return sorted(token for token in found if token is not None)


class CheckpointAnswerer:
    """An `Answerer` over a checkpoint folder with a chat template.

    The folder's files are checked here; weights are loaded when the first question is asked.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise UserError.one(
                "no chat template, so it cannot be asked questions",
                str(folder),
                "add chat_template.jinja, or leave --questions out",
            )
        self._stop = stop_ids(folder, self._tokenizer)
        self._streamed = StreamedModel(folder)

    def _prompt(self, question: str) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def answers(self, questions: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """See `Answerer.answers`. Prompts of one length make a batch, so nothing is padded."""
        model = self._streamed.whole()
        prompts = [self._prompt(question) for question in questions]
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), _BATCH):
                chosen = members[start : start + _BATCH]
                ids = torch.tensor([prompts[i] for i in chosen])
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=self._stop or None,
                    pad_token_id=self._stop[0] if self._stop else 0,
                )
                for i, row in zip(chosen, output, strict=True):
                    yield i, self._tokenizer.decode(row[length:], skip_special_tokens=True)
