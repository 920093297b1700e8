"""Train small language models for compare_methods.py, one after the other, from one seed.

    python -m scripts.language_models.train [llama qwen3 gemma2 gpt_neox] [-o .bench/models]

Ten to twenty minutes each on two quiet CPU cores with bfloat16 units; nothing is downloaded. Each
becomes a Hugging Face folder of float16 with its tokenizer; calibration.jsonl (training text) and
heldout.txt (text that no training saw) come beside them. Training that was stopped goes on from
where it last saved itself; what is done is left alone. The weights depend in their last bits on
the processor and the version of PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mlcawq.checkpoint.writing import staged_folder, write_file
from scripts.demo_model.tokenizer import END_OF_TEXT, byte_level_bpe
from scripts.language_models.architectures import ARCHITECTURES, LONGEST, VOCABULARY, new_model
from scripts.language_models.corpus import Corpus, read_corpus

MODELS = Path(__file__).resolve().parent.parent.parent / ".bench" / "models"
_SAVE_EVERY = 100  # steps
_HELD_OUT_CHARACTERS = 120_000
_CALIBRATION_CHARACTERS = 400_000
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Schedule:
    """The rate climbs to `peak` over `warm_up` steps and falls in a line to nothing.

    rows, length: tokens of a step, [rows, length].
    """

    steps: int = 1000
    warm_up: int = 50
    peak: float = 2e-3
    rows: int = 8
    length: int = 256

    def rate(self, step: int) -> float:
        return self.peak * min((step + 1) / self.warm_up, (self.steps - step) / self.steps)


@dataclass(frozen=True)
class Text:
    """The corpus in tokens, documents joined by the end-of-text token: int16 [N] each."""

    train: np.ndarray
    held_out: np.ndarray

    def rows(self, schedule: Schedule, seed: int, step: int) -> torch.Tensor:
        """Rows of one step, int64 [rows, length + 1]; the same for one step whenever asked."""
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(0, len(self.train) - schedule.length - 1, schedule.rows)
        chosen = np.stack([self.train[start : start + schedule.length + 1] for start in starts])
        return torch.from_numpy(chosen.astype(np.int64))


def prepare(folder: Path) -> tuple[Text, PreTrainedTokenizerFast]:
    """The tokenizer and the text in tokens, made once and kept in `folder`."""
    if not (folder / "tokens.npz").is_file():
        corpus = read_corpus()
        folder.mkdir(parents=True, exist_ok=True)
        _write_texts(corpus, folder)
        tokenizer = byte_level_bpe(corpus.train, VOCABULARY, [END_OF_TEXT])
        tokenizer.save(str(folder / "tokenizer.json"))

        def encoded(documents: tuple[str, ...]) -> np.ndarray:
            ids: list[int] = []
            for document in tokenizer.encode_batch(list(documents)):
                ids += [*document.ids, 0]
            return np.array(ids, np.int16)

        parts = {"train": encoded(corpus.train), "held_out": encoded(corpus.held_out)}
        unfinished = folder / "tokens.partial.npz"
        np.savez(unfinished, **parts)
        unfinished.rename(folder / "tokens.npz")
    with np.load(folder / "tokens.npz") as stored:
        text = Text(stored["train"], stored["held_out"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
    )
    return text, tokenizer


def _write_texts(corpus: Corpus, folder: Path) -> None:
    """What compare_methods.py calibrates on and scores, pieces from all over the corpus."""
    pieces = [doc[:4000] for doc in corpus.train]
    order = np.random.default_rng(0).permutation(len(pieces))
    lines, size = [], 0
    for i in order:
        if size > _CALIBRATION_CHARACTERS:
            break
        lines.append(json.dumps({"text": pieces[i]}))
        size += len(pieces[i])
    write_file(folder / "calibration.jsonl", "\n".join(lines) + "\n")
    share = _HELD_OUT_CHARACTERS // len(corpus.held_out)
    held_out = "\n\n".join(doc[: max(share, 1)] for doc in corpus.held_out)
    write_file(folder / "heldout.txt", held_out)


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def _loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens int64 [B, T + 1] after the first, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(name: str, text: Text, schedule: Schedule, seed: int, saved: Path) -> PreTrainedModel:
    """Train to the end, from what `saved` holds where it is there."""
    torch.manual_seed(seed)
    model = new_model(name)
    optimizer = _optimizer(model)
    start = 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters / 1e6:.1f} million parameters, from step {start}", file=sys.stderr)
    began = time.monotonic()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = _loss(model, text.rows(schedule, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            seconds = time.monotonic() - began
            print(f"{name} step {step + 1} loss {loss.item():.3f} {seconds:.0f} s", file=sys.stderr)
        if step % _SAVE_EVERY == _SAVE_EVERY - 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            unfinished = saved.with_suffix(".partial")
            torch.save({**state, "step": step + 1}, unfinished)
            unfinished.rename(saved)
    return model.eval()


def _unigram(text: Text) -> float:
    """Cross-entropy of the held-out tokens under the training text's frequencies, in nats."""
    counts = np.bincount(text.train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[text.held_out].mean())


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, text: Text, length: int) -> float:
    count = min(64, len(text.held_out) // (length + 1))
    windows = text.held_out[: count * (length + 1)].astype(np.int64).reshape(count, -1)
    parts = torch.from_numpy(windows).split(16)
    return math.fsum(_loss(model, part).item() * len(part) for part in parts) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("-o", "--out", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    arguments = parser.parse_args()
    names = arguments.names or list(ARCHITECTURES)
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"no such architecture: {', '.join(unknown)}")
    schedule = Schedule(steps=arguments.steps)
    text, tokenizer = prepare(arguments.out)
    print(
        f"{len(text.train)} tokens to train on; a unigram model's loss on the {len(text.held_out)} "
        f"held out: {_unigram(text):.3f}",
        file=sys.stderr,
    )
    for name in names:
        folder, saved = arguments.out / name, arguments.out / f"{name}.training.pt"
        if folder.is_dir():
            print(f"{name}: is there", file=sys.stderr)
            continue
        model = train(name, text, schedule, arguments.seed, saved)
        print(f"{name}: held-out loss {_held_out_loss(model, text, schedule.length):.3f}")
        with staged_folder(folder) as stage:
            model.to(torch.float16).save_pretrained(stage)
            tokenizer.save_pretrained(stage)
        saved.unlink()


if __name__ == "__main__":
    main()
