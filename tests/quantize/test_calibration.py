"""From text to blocks of tokens."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer

from mlcawq.errors import UserError
from mlcawq.hub_data import HubData
from mlcawq.quantize.calibration import BUNDLED, HUB_DATASETS, batched, load_calibration

LINES = [f"Line {i}: the quick brown fox no. {i * i} jumps over {i} dogs." for i in range(400)]


def _write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def _all_tokens(data: object) -> list[int]:
    sequences = [*data.sequences, *data.held_out]  # type: ignore[attr-defined]
    return sorted(token for sequence in sequences for token in sequence.tolist())


def test_a_long_text_is_cut_and_nothing_is_dropped(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "\n".join(LINES)
    data = load_calibration(_write(tmp_path / "a.txt", text), tokenizer, samples=10**6, seq_len=100)
    expected = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert _all_tokens(data) == sorted(expected)
    lengths = sorted({len(s) for s in [*data.sequences, *data.held_out]})
    assert lengths[-1] == 100
    assert len(lengths) <= 2  # only the last block may be shorter
    assert not data.held_out_is_seen


def test_short_texts_share_blocks(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": line}) for line in LINES))
    tokenizer = make_tokenizer()
    data = load_calibration(path, tokenizer, samples=10**6, seq_len=64)
    ends = sum(int((s == tokenizer.eos_token_id).sum()) for s in [*data.sequences, *data.held_out])
    assert ends == len(LINES)
    assert sum(len(s) < 64 for s in [*data.sequences, *data.held_out]) <= 1


def test_samples_and_seed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\n".join(LINES))
    tokenizer = make_tokenizer()
    data = [load_calibration(path, tokenizer, samples=5, seq_len=64, seed=s) for s in (0, 0, 1)]
    assert len(data[0].sequences) == 5
    assert len(data[0].held_out) == 8
    assert data[0].digest == data[1].digest != data[2].digest
    seen = {tuple(s.tolist()) for s in data[0].sequences}
    assert not seen & {tuple(s.tolist()) for s in data[0].held_out}


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    path = _write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    tokenizer = make_tokenizer()
    data = load_calibration(path, tokenizer, seq_len=64)
    text = tokenizer.decode(data.sequences[0])
    assert text == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert data.held_out_is_seen

    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        load_calibration(path, tokenizer, seq_len=64)


def test_every_block_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    data = load_calibration(
        _write(tmp_path / "a.txt", "\n".join(LINES)), tokenizer, samples=4, seq_len=50
    )
    for sequence in [*data.sequences, *data.held_out]:
        assert sequence[0] == bos
        assert (sequence[1:] != bos).all()
        assert len(sequence) <= 50


def test_bundled_corpus_works_without_a_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    data = load_calibration(BUNDLED, tokenizer, samples=2, seq_len=32)
    assert [len(sequence) for sequence in data.sequences] == [32, 32]


@pytest.mark.parametrize("name", ["pileval", "wikitext"])
def test_hub_datasets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*arguments: object, split: str) -> list[dict[str, str]]:
        asked.append((*arguments, split))
        return [{"text": line + "\n"} for line in LINES]

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    data = load_calibration(name, make_tokenizer(), samples=4, seq_len=64)
    assert [HubData(*given) for given in asked] == [HUB_DATASETS[name]]
    assert [len(sequence) for sequence in data.sequences] == [64] * 4
    assert data.source == name


def test_hub_datasets_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, split: str) -> None:
        raise ConnectionError("no route to host")

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    with pytest.raises(UserError, match="no route to host"):
        load_calibration("pileval", make_tokenizer())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hub-data"):
        load_calibration("pileval", make_tokenizer())


def test_all_bad_lines_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"text": "ok"}\n{"txt": 1}\n{\n{"messages": [{}]}\n')
    with pytest.raises(UserError) as caught:
        load_calibration(path, make_tokenizer())
    assert [p.where.rpartition(":")[2] for p in caught.value.problems] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", None, "no such file"),
        ("a.pdf", "x", "neither a .txt or .jsonl file"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", '{"text": "x\\ud800"}', "half of a UTF-16 pair"),
        ("a.jsonl", '{"messages": []}', "neither text nor messages"),
    ],
)
def test_unusable_sources(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(str(content))
    with pytest.raises(UserError, match=message):
        load_calibration(str(path), make_tokenizer())


def test_lines_end_with_newlines_only(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in a JSON string as they are, and Windows begins with a BOM."""
    tokenizer = make_tokenizer()
    text = "fox\u2028dog\u0085wizards"
    rows = [json.dumps({"text": text}, ensure_ascii=False), json.dumps({"text": "box"})]
    path = _write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(rows))
    data = load_calibration(path, tokenizer, seq_len=64)
    pieces = tokenizer.decode(data.sequences[0]).split("<|im_end|>")
    assert sorted(pieces) == ["", "box", text]


def test_a_huge_line_is_shuffled_in_parts(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "fox " * 100_000)
    tokenizer = make_tokenizer()
    data = load_calibration(path, tokenizer, samples=10**6, seq_len=512)
    ends = sum(int((s == tokenizer.eos_token_id).sum()) for s in [*data.sequences, *data.held_out])
    assert ends == 7  # of 400,000 characters, 65,536 each


def test_batches_are_not_padded() -> None:
    sequences = [torch.arange(length) for length in (600, 600, 3, 600, 600, 600)]
    batches = batched(sequences)
    assert [tuple(batch.shape) for batch in batches] == [(3, 600), (2, 600), (1, 3)]
