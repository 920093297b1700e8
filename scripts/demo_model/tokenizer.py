"""The demo model's tokenizer: byte-level BPE, digits one by one, ChatML specials and template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.demo_model.chats import DEFAULT_SYSTEM, ChatSource
from scripts.demo_model.prose import book_paragraphs, prose

VOCABULARY = 3072
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Contractions, words with their space, single digits, other marks, line breaks, spaces.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)


def _corpus(chats: ChatSource, rng: random.Random) -> Iterator[str]:
    books = book_paragraphs()
    yield from books
    for _ in range(300):
        yield prose(chats.relations, books, 1500, rng)
    for _ in range(20000):
        for turn in chats.turns(rng):
            yield turn.question
            yield turn.answer


def byte_level_bpe(texts: Iterable[str], size: int, specials: list[str]) -> Tokenizer:
    """A tokenizer of `size` entries that can write any text (all 256 bytes are in it)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(chats: ChatSource, seed: int) -> PreTrainedTokenizerFast:
    """The demo's: `VOCABULARY` entries, made for the demo's own text."""
    specials = [END_OF_TEXT, TURN_START, TURN_END]
    tokenizer = byte_level_bpe(_corpus(chats, random.Random(seed)), VOCABULARY, specials)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json in the form that transformers 4 and 5 and
    other programs read (transformers 5 by itself would name a class that only it knows)."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    specials = {
        str(tokenizer.convert_tokens_to_ids(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in (END_OF_TEXT, TURN_START, TURN_END)
    }
    config = {
        "added_tokens_decoder": specials,
        "additional_special_tokens": [TURN_START, TURN_END],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": tokenizer.model_max_length,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
