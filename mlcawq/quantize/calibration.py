"""Calibration text: from a file, a data set's name or the bundled corpus to blocks of tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.hub_data import HubData, hub_rows

BUNDLED = "bundled"
HUB_DATASETS = {
    "pileval": HubData("mit-han-lab/pile-val-backup", None, "validation"),
    "wikitext": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
}
_PASSAGE = 1 << 16  # characters: what a long text is shuffled by
_OVERSUPPLY = 4  # blocks are drawn from so many times the tokens needed, where there are as many
_HELD_OUT = 8  # blocks
BATCH_TOKENS = 2048  # that go through a block together where memory allows

# A document is running text, or the messages of a chat.
Document = str | list[dict[str, Any]]


@dataclass(frozen=True)
class CalibrationData:
    """Unpadded token sequences, int64 [T] each.

    sequences: what the search sees. held_out: what the finished model is measured on; a part of
    `sequences` where the text was too short to spare any (`held_out_is_seen`).
    source: what they were made from, for the record.
    """

    sequences: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]
    source: str
    held_out_is_seen: bool = False

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, held-out ones included."""
        digest = hashlib.sha256()
        for part in (self.sequences, self.held_out):
            digest.update(f"{len(part)}:".encode())
            for sequence in part:
                digest.update(f"{len(sequence)}:".encode() + sequence.numpy().tobytes())
        return digest.hexdigest()


def batched(sequences: Sequence[torch.Tensor], tokens: int = BATCH_TOKENS) -> list[torch.Tensor]:
    """Sequences of equal length stacked to [B, T], about `tokens` each; nothing is padded.

    Longer sequences come first, those of one length in their order.
    """
    batches: list[torch.Tensor] = []
    ordered = sorted(sequences, key=len, reverse=True)
    for length, equal in itertools.groupby(ordered, len):
        count = max(1, tokens // length)
        alike = list(equal)
        batches.extend(
            torch.stack(alike[start : start + count]) for start in range(0, len(alike), count)
        )
    return batches


def load_calibration(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
) -> CalibrationData:
    """Blocks of `seq_len` tokens of the model's own tokenizer.

    source: "bundled", a .txt or .jsonl file, or a name in HUB_DATASETS. A .jsonl line is
        {"text": …} or {"messages": [{"role", "content"}, …]}; messages are rendered by the model's
        chat template.
    tokenizer: of transformers.

    Documents are shuffled by `seed`, joined by the end-of-text token and cut: a long text becomes
    many blocks, a short one shares a block with its neighbours, the last block may be shorter.
    Each block begins with the tokens that the tokenizer begins every text with. At most `samples`
    blocks calibrate; up to 8 others are held out. Raises UserError listing every unusable line.
    """
    documents = list(_documents(source))
    lenient = source == BUNDLED
    rng = random.Random(seed)
    rng.shuffle(documents)

    prefix = _prefix(tokenizer)
    body = seq_len - len(prefix)
    if body < 1:
        raise UserError.one(f"{seq_len} tokens are too few", "--calib-seq-len")
    wanted = (samples + _HELD_OUT) * body * _OVERSUPPLY
    stream: list[int] = []
    for document in documents:
        stream.extend(_tokens(document, tokenizer, source, lenient))
        if len(stream) >= wanted:
            break
    blocks = [
        torch.tensor(prefix + stream[start : start + body]) for start in range(0, len(stream), body)
    ]
    if not blocks or sum(map(len, blocks)) < 2:
        raise UserError.one("no text in it", source, "give a file with some text")
    rng.shuffle(blocks)
    spare = min(_HELD_OUT, max(len(blocks) - samples, len(blocks) // 10))
    held_out, sequences = blocks[:spare], blocks[spare:][:samples]
    seen = not held_out
    return CalibrationData(
        tuple(sequences),
        tuple(held_out or sequences[:_HELD_OUT]),
        Path(source).name if source not in (BUNDLED, *HUB_DATASETS) else source,
        seen,
    )


def _prefix(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    begin = tokenizer("").input_ids
    return [bos] if bos is not None and begin[:1] == [bos] else []


def _tokens(document: Document, tokenizer: Any, source: str, lenient: bool) -> list[int]:
    if isinstance(document, str):
        end = tokenizer.eos_token_id
        tokens = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        return tokens if end is None else [*tokens, end]
    if not tokenizer.chat_template:
        if not lenient:
            raise UserError.one(
                "holds chat messages, and the model has no chat template",
                source,
                'give raw text ({"text": …} lines or a .txt file)',
            )
        return _tokens("\n".join(message["content"] for message in document), tokenizer, "", True)
    try:
        text = tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:  # templates raise whatever their authors chose
        raise UserError.one(
            f"the model's chat template refuses a dialogue: {error}",
            source,
            "check the roles and their order",
        ) from None
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _documents(source: str) -> Iterator[Document]:
    if source in HUB_DATASETS:
        return _passages(_hub_texts(source))
    if source == BUNDLED:
        path = Path(str(files("mlcawq.quantize") / "data" / "calibration.jsonl"))
    else:
        path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError.one(
            f"{source!r} is neither a .txt or .jsonl file nor a known data set",
            "--calib",
            f"give a file, or one of: {BUNDLED}, {', '.join(HUB_DATASETS)}",
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError.one("no such file", str(path), "check --calib") from None
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.one(f"not UTF-8 text: {error}", str(path)) from None
    return _jsonl(content, str(path)) if path.suffix == ".jsonl" else _passages([content])


def _passages(texts: Iterable[str]) -> Iterator[Document]:
    """Texts as documents, long ones in parts that end with a line, or within a very long one."""
    for text in texts:
        part: list[str] = []
        size = 0
        for line in _pieces(text):
            part.append(line)
            size += len(line)
            if size >= _PASSAGE:
                yield "".join(part)
                part, size = [], 0
        if "".join(part).strip():
            yield "".join(part)


def _pieces(text: str) -> Iterator[str]:
    """The lines of a text with their ends; lines beyond _PASSAGE characters in parts."""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _PASSAGE):
            yield line[start : start + _PASSAGE]


def _jsonl(content: str, where: str) -> Iterator[Document]:
    documents: list[Document] = []
    problems: list[Problem] = []
    # Not splitlines: JSON strings may hold U+2028 and other ends of lines as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        document = _parse_line(line)
        if isinstance(document, Problem):
            problems.append(Problem(document.what, f"{where}:{number}", document.fix))
        else:
            documents.extend(_passages([document]) if isinstance(document, str) else [document])
    if len(problems) > 10:
        problems = [*problems[:10], Problem(f"and {len(problems) - 10} more lines", where)]
    raise_all(problems)
    return iter(documents)


def _parse_line(line: str) -> Document | Problem:
    wanted = 'a line is {"text": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Problem("holds half of a UTF-16 pair (\\ud800 to \\udfff), which is no character")
    except (ValueError, RecursionError) as error:
        return Problem(f"not valid JSON: {error}", fix=wanted)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    return Problem("neither text nor messages", fix=wanted)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _hub_texts(name: str) -> Iterator[str]:
    rows = hub_rows(
        name,
        HUB_DATASETS[name],
        option="--calib",
        instead="use the bundled corpus (leave --calib out)",
    )
    if name == "wikitext":  # one line a row: an article is many rows
        return iter(["".join(row["text"] for row in rows)])
    return (row["text"] for row in rows)
