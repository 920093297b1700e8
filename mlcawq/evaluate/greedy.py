"""Greedy continuation of plain text, with either kind of model folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mlcawq.checkpoint.config import load_json
from mlcawq.evaluate.folders import CHAT_CONFIG, Kind
from mlcawq.evaluate.text import TextTokenizer

_SEQUENCE = 0


class Continuer(Protocol):
    """A model that goes on from token ids, one likeliest token after the other."""

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """Without end: whoever iterates decides when it is enough."""
        ...


def open_continuer(folder: Path, kind: Kind, device: str, longest: int) -> Continuer:
    """longest: prompt and continuation together, in tokens. Weights are loaded here."""
    if kind == "built":
        return _BuiltContinuer(folder, device, longest)
    return _CheckpointContinuer(folder)


class _CheckpointContinuer:
    """transformers' model with its own cache; as a whole, for every token needs every block."""

    def __init__(self, folder: Path) -> None:
        from mlcawq.checkpoint.streaming import StreamedModel

        self._model = StreamedModel(folder).whole()

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """See `Continuer.tokens`."""
        import torch

        cache: Any = None
        ids = torch.tensor([list(prompt)])
        while True:
            with torch.no_grad():
                output = self._model(ids, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            yield token
            ids = torch.tensor([[token]])


class _BuiltContinuer:
    """The folder's library, in a paged cache for one sequence."""

    def __init__(self, folder: Path, device: str, longest: int) -> None:
        from mlcawq.engine.artifact import read_folder
        from mlcawq.engine.runtime import ModelRuntime

        built = read_folder(folder)
        self._runtime = ModelRuntime(built, device, max_batch=1, max_total_tokens=longest)

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """See `Continuer.tokens`."""
        runtime = self._runtime
        runtime.add_sequence(_SEQUENCE)
        try:
            logits = np.empty((1, 0))
            for start in range(0, len(prompt), runtime.prefill_chunk_size):
                piece = prompt[start : start + runtime.prefill_chunk_size]
                logits = runtime.prefill([(_SEQUENCE, piece)])
            while True:
                token = int(logits[0].argmax())
                yield token
                logits = runtime.decode([_SEQUENCE], [token])
        finally:
            runtime.remove_sequence(_SEQUENCE)


def continue_text(
    continuer: Continuer,
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    *,
    until: Sequence[str],
    ends: Collection[int],
    max_new_tokens: int,
) -> str:
    """What follows the prompt, up to the first of the strings `until` or of the tokens `ends`."""
    found: list[int] = []
    text = ""
    source = continuer.tokens(prompt)
    while len(found) < max_new_tokens:
        token = next(source)
        if token in ends:
            break
        found.append(token)
        text = tokenizer.decode(found)
        places = [text.find(stop) for stop in until if stop in text]
        if places:
            return text[: min(places)]
    return text


def named_tokens(folder: Path, kind: Literal["bos", "eos"], tokenizer: TextTokenizer) -> list[int]:
    """The tokens that begin or end texts: the tokenizer's own first, then those of the model."""
    found: list[Any] = [tokenizer_token(folder, kind, tokenizer)]
    for name in ("config.json", "generation_config.json", CHAT_CONFIG):
        if (folder / name).is_file():
            given = load_json(folder / name).get(f"{kind}_token_id")
            found += given if isinstance(given, list) else [given]
    return list(dict.fromkeys(token for token in found if token is not None))


def tokenizer_token(
    folder: Path, kind: Literal["bos", "eos"], tokenizer: TextTokenizer
) -> int | None:
    """The tokenizer's own token of that kind, None where it has none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = load_json(folder / name).get(f"{kind}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return tokenizer.vocabulary().get(text)
    return None
