"""The tokenizer part of a built folder: its files, and what MLC wants to know of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import load_json
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.errors import UserError

# mlc_llm's list; tokenizer.json is the one that is read, the others are for other programs.
MLC_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
_ALSO_COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_SPACE = "\u2581"  # SentencePiece's mark of a space


def copy_tokenizer(checkpoint: Path, out: Path) -> list[str]:
    """Copy a checkpoint's tokenizer to `out`; tokenizer.json is made where only a slow one exists.

    Returns the names for "tokenizer_files". Raises UserError when there is no tokenizer, or when
    it cannot be converted.
    """
    require_tokenizer(checkpoint)
    for name in (*MLC_TOKENIZER_FILES, *_ALSO_COPIED):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    if not (out / "tokenizer.json").is_file():
        _convert_slow_tokenizer(checkpoint, out / "tokenizer.json")
    return [name for name in MLC_TOKENIZER_FILES if (out / name).is_file()]


def tokenizer_info(path: Path) -> dict[str, Any]:
    """MLC's "tokenizer_info" of a tokenizer.json.

    token_postproc_method: "byte_level" where the tokens spell bytes as GPT-2 does, otherwise
    "byte_fallback" (SentencePiece's way: a mark for the space, <0x0A> for other bytes).
    prepend_space_in_encode, strip_space_in_decode: whether the tokenizer puts a space before a
    text, and takes it away again.
    """
    content = load_json(path)
    method = "byte_fallback"
    for decoder in _steps(content.get("decoder"), "decoders"):
        if decoder.get("type") in ("ByteLevel", "ByteFallback"):
            method = "byte_level" if decoder["type"] == "ByteLevel" else "byte_fallback"
    return {
        "token_postproc_method": method,
        "prepend_space_in_encode": any(
            step.get("type") == "Prepend" and step.get("prepend") == _SPACE
            for step in _steps(content.get("normalizer"), "normalizers")
        ),
        "strip_space_in_decode": any(
            step.get("type") == "Strip"
            and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)
            for step in _steps(content.get("decoder"), "decoders")
        ),
    }


def _steps(stage: object, parts: str) -> Iterator[Mapping[str, Any]]:
    """A stage of tokenizer.json, or each step of it where it is a sequence."""
    if not isinstance(stage, Mapping):
        return
    if stage.get("type") == "Sequence":
        yield from (step for step in stage.get(parts) or () if isinstance(step, Mapping))
    else:
        yield stage


def _convert_slow_tokenizer(checkpoint: Path, target: Path) -> None:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), use_fast=True)
        tokenizer.backend_tokenizer.save(str(target))
    except Exception as error:  # transformers raises whatever its converters meet
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError.one(
            f"there is no tokenizer.json, and it could not be made from the other files: {reason}",
            str(checkpoint),
            "pip install 'mlcawq[sentencepiece]', or copy tokenizer.json from another release of "
            "the model",
        ) from error
