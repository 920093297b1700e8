"""How the next token is chosen from logits: the parameters, their checks, and the sampler.

Order of processing, the one of Hugging Face's `generate`:

 1. logit_bias is added (OpenAI);
 2. repetition_penalty over prompt and answer: positive logits are divided by it, negative ones
    multiplied (Keskar et al. 2019, arXiv:1909.05858, as in Hugging Face);
 3. presence_penalty and frequency_penalty over the answer only: minus presence where a token
    has occurred, minus frequency times its count (OpenAI);
 4. temperature; 0 is greedy and ends here with the largest logit;
 5. top_k, then top_p on what is left, renormalised (Holtzman et al. 2020, arXiv:1904.09751);
 6. min_p: at least this fraction of the largest probability (Nguyen et al. 2024,
    arXiv:2407.01082);
 7. one uniform number of the request's own generator, through the cumulative distribution.

A request's draws depend on its seed and its logits, never on what else is in the batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mlcawq.errors import Problem, UserError, raise_all

_BLOCK = 512  # tokens whose weights are summed before one of them is drawn
_SORTED = 2048  # weights that are sorted rather than parted
_NOTHING = np.empty(0)
_of_thread = threading.local()


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling. The defaults change nothing: plain sampling at temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: a fresh one for every request
    max_tokens: int | None = None  # None: until the context window is full
    stop: Sequence[str] = ()  # these strings end the answer and are not part of it
    stop_token_ids: Sequence[int] = ()  # beside the model's own
    ignore_eos: bool = False  # the model's own stop tokens and strings do not end the answer

    def __post_init__(self) -> None:
        raise_all(self._problems())

    @property
    def needs_counts(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Defaults written in mlc-chat-config.json (MLC's keys, which are generation_config's).

        Raises UserError naming that file when one of its values is out of range.
        """
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: config[name] for name in names if config.get(name) is not None}
        if given.get("top_k") == -1:  # vLLM's way to write that it is off
            given["top_k"] = 0
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(
                *(Problem(p.what, "mlc-chat-config.json", p.fix) for p in error.problems)
            ) from None

    def override(self, **changes: Any) -> SamplingParams:
        """A copy with the `changes` that are not None. Raises UserError with all bad ones."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def _problems(self) -> Iterable[Problem]:
        for f in fields(self):
            wanted = _RANGES.get(f.name)
            if wanted is None:
                continue
            text, kinds, valid = wanted
            value = getattr(self, f.name)
            if value is None and f.name in ("seed", "max_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not valid(value):
                yield Problem(f"{f.name} is {value!r}", fix=f"it must be {text}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            yield Problem(f"stop is {self.stop!r}", fix="it must be a list of non-empty strings")
        if not all(type(i) is int and i >= 0 for i in self.stop_token_ids):
            yield Problem(f"stop_token_ids is {self.stop_token_ids!r}", fix="give token ids")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not -100 <= bias <= 100:
                yield Problem(
                    f"logit_bias has {token!r}: {bias!r}", fix="map token ids to -100 ... 100"
                )


_REAL = (int, float)
_INT = (int,)
_RANGES: dict[str, tuple[str, tuple[type, ...], Any]] = {
    "temperature": ("0 (greedy) or more, at most 100", _REAL, lambda v: 0 <= v <= 100),
    "top_p": ("above 0 and at most 1", _REAL, lambda v: 0 < v <= 1),
    "top_k": ("0 (off) or a positive whole number", _INT, lambda v: v >= 0),
    "min_p": ("from 0 to 1", _REAL, lambda v: 0 <= v <= 1),
    "repetition_penalty": ("above 0 (1 is off)", _REAL, lambda v: 0 < v < math.inf),
    "presence_penalty": ("from -2 to 2", _REAL, lambda v: -2 <= v <= 2),
    "frequency_penalty": ("from -2 to 2", _REAL, lambda v: -2 <= v <= 2),
    "seed": ("a whole number from 0 to 2^64 - 1", _INT, lambda v: 0 <= v < 2**64),
    "max_tokens": ("a positive whole number", _INT, lambda v: v > 0),
}


class SamplerState:
    """What one request's sampling remembers: its generator and which tokens have occurred."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.rng = np.random.default_rng(params.seed)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        outside = self._bias_ids >= vocab_size
        if outside.any():
            raise UserError.one(
                f"logit_bias names token {int(self._bias_ids[outside][0])}",
                fix=f"the model's token ids end at {vocab_size - 1}",
            )
        self._seen: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        if params.needs_counts:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[np.asarray(prompt_ids, np.int64)] = True
            self._counts = np.zeros(vocab_size, np.int32)

    @property
    def penalizes(self) -> bool:
        """Whether `penalize` changes anything."""
        return self._seen is not None or bool(self._bias_ids.size)

    def record(self, token: int) -> None:
        """Count a token of the answer."""
        if self._seen is not None and self._counts is not None:
            self._seen[token] = True
            self._counts[token] += 1

    def penalize(self, logits: np.ndarray) -> None:
        """Steps 1 to 3 of the module's list, in place.

        logits: float32 [n], of the first n ids of the vocabulary; the others cannot be chosen.
        """
        if self._bias_ids.size:
            inside = self._bias_ids < logits.size
            logits[self._bias_ids[inside]] += self._bias[inside]
        if self._seen is None or self._counts is None:
            return
        p = self.params
        if p.repetition_penalty != 1.0:
            ids = np.flatnonzero(self._seen[: logits.size])
            seen = logits[ids]
            logits[ids] = np.where(
                seen < 0, seen * p.repetition_penalty, seen / p.repetition_penalty
            )
        if p.presence_penalty or p.frequency_penalty:
            ids = np.flatnonzero(self._counts[: logits.size])
            logits[ids] -= p.presence_penalty + p.frequency_penalty * self._counts[ids]


def sample(logits: np.ndarray, states: Sequence[SamplerState], active_vocab: int) -> list[int]:
    """Choose one token a row, and count it in the row's state.

    logits: float32 [B, V]; states: B of them. Ids from `active_vocab` on are padding that the
    tokenizer cannot print, and are never chosen. Raises UserError when the model computed
    logits that are no numbers.
    """
    rows = logits[:, :active_vocab]
    tops = rows.max(axis=1)
    if not np.isfinite(tops).all():  # NaN and +inf show up in the maximum, as does all -inf
        raise UserError.one(
            "the model computed logits that are not finite numbers (NaN or infinity)",
            fix="build the model again with --verify; when that passes, an activation has "
            "overflowed float16: build the checkpoint unquantized as q0f32 to compare",
        )
    tokens = []
    for row, state in zip(rows, states, strict=True):
        if state.penalizes:
            row = row.copy()
            state.penalize(row)
        token = _draw(row, state) if state.params.temperature > 0 else int(row.argmax())
        state.record(token)
        tokens.append(token)
    return tokens


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Steps 4 to 6: the tokens left, in order of id, and their probabilities, which sum to 1.

    logits: float32 [V], penalties applied; params.temperature > 0.
    Returns int64 [n] and float64 [n].
    """
    ids, weights = _weighed(logits, params)
    return np.arange(weights.size) if ids is None else ids, weights / weights.sum()


def _weighed(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """As `candidates`, but the probabilities are not normalised, and ids are None for all tokens:
    passes over a whole vocabulary are what sampling costs. The weights may be those of `_scratch`.
    """
    ids = None
    # float64, and the maximum first: a tiny temperature must overflow nothing.
    weights = np.subtract(logits, logits.max(), out=_scratch(logits.size), dtype=np.float64)
    if 0 < params.top_k < logits.size:
        kth = np.partition(logits, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(logits >= kth)
        weights = weights[ids]
    weights /= params.temperature
    np.exp(weights, out=weights)
    if params.top_p < 1.0:
        keep = _nucleus(weights, params.top_p)
        ids, weights = keep if ids is None else ids[keep], weights[keep]
    if params.min_p > 0.0:
        keep = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = keep if ids is None else ids[keep], weights[keep]
    return ids, weights


def _scratch(size: int) -> np.ndarray:
    """float64 [size], the same ones in a thread for one size: a new megabyte for every token would
    be mapped and cleared by the system every time.
    """
    if getattr(_of_thread, "scratch", _NOTHING).size != size:
        _of_thread.scratch = np.empty(size)
    scratch: np.ndarray = _of_thread.scratch
    return scratch


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ascending indices of the smallest set of heaviest tokens whose share reaches top_p; among
    equally heavy ones the first.
    """
    total = weights.sum()
    # Tokens below (1 - top_p) / n weigh less than 1 - top_p together: the nucleus lies among the
    # others, which are few, so that only few need to be sorted.
    likely = np.flatnonzero(weights >= (1.0 - top_p) / weights.size * total)
    heavy = weights[likely]
    # The tolerance keeps a sum that is top_p but for rounding from taking one token more.
    count, least = _heaviest(heavy, (top_p - 1e-12) * total)
    kept = heavy >= least
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:  # of tokens that weigh as much as the lightest one kept
        kept[np.flatnonzero(heavy == least)[-surplus:]] = False
    return likely[kept]


def _heaviest(weights: np.ndarray, share: float) -> tuple[int, float]:
    """How many of the heaviest weigh `share` together, all of them where they never do, and the
    lightest of those: a quickselect by weight, since sorting all would take far longer.
    """
    count, rest = 0, weights
    while rest.size > _SORTED:
        middle = rest.size // 2
        rest = np.partition(rest, middle)
        upper = rest[middle:]
        weight = float(upper.sum())
        if weight < share:
            share -= weight
            count += upper.size
            rest = rest[:middle]
        else:
            rest = upper
    order = np.sort(rest)[::-1]
    last = min(int(np.searchsorted(np.cumsum(order), share)), order.size - 1)
    return count + last + 1, float(order[last])


def _draw(logits: np.ndarray, state: SamplerState) -> int:
    ids, weights = _weighed(logits, state.params)
    # Blocks first, then within one block: a running sum over all of them takes ten times as long.
    starts = np.arange(0, weights.size, _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts))
    point = state.rng.random() * ends[-1]
    block = _reached(ends, point)
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK])
    place = int(starts[block]) + _reached(inside, point - (ends[block - 1] if block else 0.0))
    return place if ids is None else int(ids[place])


def _reached(sums: np.ndarray, point: float) -> int:
    """Index of the first running sum above `point`. Where rounding has left none above it, of the
    first one that is the last: what weighs nothing is never chosen.
    """
    first = int(np.searchsorted(sums, point, side="right"))
    return min(first, int(np.searchsorted(sums, sums[-1])))
