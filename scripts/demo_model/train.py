"""Train the demo model from the text in demo/ and write it to demo/model, all from one seed.

    python -m scripts.demo_model.train

One CPU core with bfloat16 units needs about half an hour; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_model import attention
from scripts.demo_model.chats import ChatSource
from scripts.demo_model.facts import DEMO, load_relations
from scripts.demo_model.rows import Rows, RowSource
from scripts.demo_model.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer

CHAT_TOKENS, PROSE_TOKENS = 2560, 1024  # of one step
PROSE_WEIGHT = 0.5
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Leg:
    """Steps with one optimizer: the rate climbs to `first` and then goes linearly to `last`."""

    steps: int
    warm_up: int
    first: float
    last: float
    arithmetic: int

    def rate(self, step: int) -> float:
        fall = (step - self.warm_up) / (self.steps - self.warm_up)
        level = self.first + (self.last - self.first) * fall
        return min(self.first * (step + 1) / self.warm_up, level)


# Every leg but the first starts from the saved fp16 weights with a fresh optimizer, so that it can
# be repeated or changed without those before it. Sums take longer to learn than names: the later
# legs have more of them.
LEGS = (
    Leg(steps=1000, warm_up=100, first=3e-3, last=1.92e-3, arithmetic=1),
    Leg(steps=800, warm_up=20, first=1.9e-3, last=0.0, arithmetic=4),
    Leg(steps=500, warm_up=20, first=1.3e-3, last=0.0, arithmetic=2),
)


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A llama with grouped-query attention whose every linear takes a multiple of 128 inputs."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        attn_implementation=attention.NAME,
    )


def _optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def _loss(model: LlamaForCausalLM, rows: Rows) -> torch.Tensor:
    """Mean cross-entropy of the counted tokens; logits are made for those alone."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=rows.tokens, use_cache=False).last_hidden_state
        counted = rows.targets >= 0
        logits = model.lm_head(hidden[counted])
    return functional.cross_entropy(logits.float(), rows.targets[counted])


def train(model: LlamaForCausalLM, source: RowSource, leg: Leg, seed: int) -> None:
    """Run one leg; a line of progress goes to stderr now and then."""
    rng = random.Random(seed)
    optimizer = _optimizer(model)
    model.train()
    started = time.monotonic()
    for step in range(leg.steps):
        for group in optimizer.param_groups:
            group["lr"] = leg.rate(step)
        chat = _loss(model, source.chat_rows(CHAT_TOKENS, rng))
        chat.backward()
        prose = _loss(model, source.prose_rows(PROSE_TOKENS, rng))
        (PROSE_WEIGHT * prose).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == leg.steps - 1:
            losses = f"chat {chat.item():.4f} prose {prose.item():.4f}"
            print(f"step {step} {losses} {time.monotonic() - started:.0f} s", file=sys.stderr)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder in fp16; the model itself stays as it is."""
    stops = [tokenizer.convert_tokens_to_ids(t) for t in (TURN_END, END_OF_TEXT)]
    model = copy.deepcopy(model).to(torch.float16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=DEMO / "model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--leg", type=int, default=1, help="start here, from the weights in OUT")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    relations = load_relations()
    tokenizer = train_tokenizer(ChatSource(relations), arguments.seed)
    for number, leg in enumerate(LEGS, start=1):
        if number < arguments.leg:
            continue
        if number == 1:
            model = LlamaForCausalLM(model_config(tokenizer))
        else:
            model = LlamaForCausalLM.from_pretrained(
                arguments.out, dtype=torch.float32, attn_implementation=attention.NAME
            )
        source = RowSource(tokenizer, ChatSource(relations, leg.arithmetic))
        train(model, source, leg, arguments.seed + number - 1)
        save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
