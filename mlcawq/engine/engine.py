"""The engine: a built folder, loaded, answering any number of requests.

    engine = Engine(folder)
    for delta in engine.generate([{"role": "user", "content": "Hello"}]):
        print(delta.text, end="")

`generate` is for one answer at a time. A server adds requests with `add_request` and calls
`step` as long as `has_work`; every step runs at most one prefill and one decode pass for all
running requests together.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlcawq.engine.artifact import TOKENIZER, BuiltFolder, read_folder
from mlcawq.engine.conversation import Message
from mlcawq.engine.detokenizer import Detokenizer, StopStrings
from mlcawq.engine.runtime import PAGE_SIZE, ModelRuntime
from mlcawq.engine.sampling import SamplerState, SamplingParams, sample
from mlcawq.engine.scheduler import Request, Scheduler, SequenceStore
from mlcawq.engine.tokenizer import ModelTokenizer, load_tokenizer
from mlcawq.errors import UserError

_SCORE_BYTES = 64 * 2**20  # of logits in one chunk of iter_logits


@dataclass
class RequestStats:
    """Counts in tokens, times in seconds.

    cached_tokens of the prompt were found in the KV cache. prefill_seconds: from the first
    forward pass to the first token. decode_seconds: from there to the last token.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        later = self.completion_tokens - 1  # the first one comes out of the prefill
        return later / self.decode_seconds if later > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Delta:
    """What is new of one answer.

    text may be empty while a character or a possible stop string is incomplete.
    finish_reason: None while it goes on; "stop" at a stop token or string; "length" at
    max_tokens or the end of the context window.
    """

    request: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stats: RequestStats


@dataclass
class _Answer:
    """The side of a request that the scheduler does not see."""

    params: SamplingParams
    sampler: SamplerState
    detokenizer: Detokenizer
    stops: StopStrings
    stop_ids: frozenset[int]
    length_limit: int  # of prompt and answer
    stats: RequestStats
    started: float | None = None
    first_token: float | None = None
    fresh_ids: list[int] = field(default_factory=list)


class Engine:
    """A built model, ready to answer.

    folder: made by `mlcawq build` or by mlc_llm, or what `read_folder` made of it. device: "auto",
    or "cpu", "cuda", "cuda:1", "vulkan", …
    max_batch: requests that run at once; the library's own limit by default.
    max_total_tokens: size of the KV cache in tokens; by default room for max_batch full
    contexts, or what memory allows.
    chunk_size: tokens in one prefill pass at most; the library's own limit by default. Between
    passes other requests decode, and an answer can be given up.
    library: the compiled library, when it is not in the folder.
    threads: that a CPU computes on; by default one for each physical core.
    weights: for a CPU, "mapped" leaves them in their files, "resident" reads them into huge pages,
    which decodes faster and takes their size in memory; "auto" does that where there is plenty,
    behind the first tokens.
    tokenizer: one that somebody has begun to load.

    Raises UserError when the folder is incomplete, damaged, or its parts do not fit together.
    """

    def __init__(
        self,
        folder: str | Path | BuiltFolder,
        device: str = "auto",
        *,
        max_batch: int | None = None,
        max_total_tokens: int | None = None,
        chunk_size: int | None = None,
        library: str | Path | None = None,
        threads: int | None = None,
        weights: str = "auto",
        tokenizer: Future[ModelTokenizer] | None = None,
    ) -> None:
        if isinstance(folder, BuiltFolder):
            built = folder
        else:
            built = read_folder(Path(folder), Path(library) if library is not None else None)
        tokenizer = tokenizer or load_tokenizer(built)
        self.folder = built.path
        self.config = built.config
        self.conversation = built.conversation
        self.default_params = SamplingParams.from_config(built.config)
        self.vocab_size = built.vocab_size
        self._runtime = ModelRuntime(
            built,
            device,
            max_batch=max_batch,
            max_total_tokens=max_total_tokens,
            threads=threads,
            weights=weights,
        )
        self.tokenizer = tokenizer.result()
        if self.tokenizer.size > self.vocab_size:
            raise UserError.one(
                f"the tokenizer has ids up to {self.tokenizer.size - 1}, "
                f"the model's end at {self.vocab_size - 1}",
                str(built.path / TOKENIZER),
                "copy the tokenizer that belongs to this model",
            )
        self.device = self._runtime.device.name
        self.library = self._runtime.library
        self.metadata = self._runtime.metadata
        configured = int(built.config["context_window_size"])
        self.context_window_size = min(configured, self._runtime.capacity)
        self.notes: list[str] = []
        if self._runtime.device.software:
            self.notes.append(f"{self.device} has no GPU behind it: its driver computes on the CPU")
        if self.context_window_size < configured:
            self.notes.append(
                f"the KV cache has room for {self.context_window_size} tokens only; "
                f"the model's context window is {configured}"
            )
        self._store = SequenceStore(self._runtime, PAGE_SIZE)
        self._scheduler = Scheduler(
            self._store,
            max_batch=self._runtime.max_batch,
            chunk_size=min(self._runtime.prefill_chunk_size, chunk_size or 2**31),
        )
        self._requests: dict[int, Request] = {}
        self._next_request = 0

    @property
    def threads(self) -> int | None:
        """That a CPU computes on; None on other devices."""
        return self._runtime.threads if self._runtime.device.kind == "cpu" else None

    @property
    def weights(self) -> str | None:
        """Where a CPU's weights are now, "mapped" or "resident"; None on other devices."""
        return self._runtime.weights if self._runtime.device.kind == "cpu" else None

    # ------------------------------------------------------------------------------ requests

    def encode(self, prompt: str | Sequence[Message] | Sequence[int]) -> list[int]:
        """Prompt ids of a text to continue, of messages, or ids themselves, checked."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_plain(prompt)
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if len(messages) == len(prompt):
            return self.tokenizer.encode_chat(messages)
        return self._checked([item for item in prompt if not isinstance(item, Mapping)])

    def add_request(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        params: SamplingParams | None = None,
    ) -> int:
        """Queue a request and return its number, which its deltas carry.

        Raises UserError when the prompt is empty or does not fit into the context window.
        """
        params = params or self.default_params
        ids = self._checked(self.encode(prompt))
        if not ids:
            raise UserError.one("the prompt is empty", fix="give at least one token of text")
        room = self.context_window_size - 1
        if len(ids) > room:
            raise UserError.one(
                f"the prompt has {len(ids)} tokens, and the context window of "
                f"{self.context_window_size} has room for {room} and an answer",
                fix="shorten it, or start a new conversation; a larger window needs a build with "
                "--context-window-size",
            )
        limit = self.context_window_size
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        stop_ids, stop_strings = self._stop_rules(params)
        answer = _Answer(
            params=params,
            sampler=SamplerState(params, ids, self.vocab_size),
            detokenizer=self.tokenizer.detokenizer(ids[-8:] if isinstance(prompt, str) else ()),
            stops=StopStrings(stop_strings),
            stop_ids=stop_ids,
            length_limit=limit,
            stats=RequestStats(prompt_tokens=len(ids)),
        )
        self._next_request += 1
        request = Request(self._next_request, ids, len(ids), payload=answer)
        self._requests[request.id] = request
        self._scheduler.add(request)
        return request.id

    def abort(self, request: int) -> None:
        """Give a request up. What it has computed stays in the cache for reuse."""
        found = self._requests.pop(request, None)
        if found is not None:
            self._scheduler.finish(found)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Delta]:
        """One round for all requests: prefill what waits, then decode one token each.

        Raises UserError when the model computes nonsense; all requests are given up then.
        """
        try:
            prefilled = self._scheduler.plan_prefill()
            deltas = self._prefill(prefilled) if prefilled else []
            skip = [request for request, _ in prefilled]
            ready, stuck = self._scheduler.plan_decode(skip)
            if ready:
                deltas += self._decode(ready)
            deltas += [self._finish(request, "", "length") for request in stuck]
        except BaseException:
            # A pass that broke off leaves the cache between two states: start from none.
            self._runtime.clear()
            self._scheduler.forget_all()
            self._requests.clear()
            raise
        return deltas

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        params: SamplingParams | None = None,
    ) -> Generator[Delta, None, None]:
        """One answer, as it comes. Closing the iterator gives the request up.

        prompt: messages for a chat model, a text to continue, or token ids.
        A long prompt takes several steps; each yields an empty delta, so that the caller can
        stop there as well.
        """
        request = self.add_request(prompt, params)
        stats = _answer(self._requests[request]).stats
        try:
            while request in self._requests:
                own = [delta for delta in self.step() if delta.request == request]
                yield from own or [Delta(request, "", (), None, stats)]
        finally:
            self.abort(request)

    # ------------------------------------------------------------------------------- scoring

    def iter_logits(self, ids: Sequence[int], chunk: int | None = None) -> Iterator[np.ndarray]:
        """The logits after every token of `ids`, in order, as float32 chunks [n, V].

        Bounded memory: a chunk holds at most `chunk` tokens, by default what 64 MB hold.
        Raises UserError when ids are out of range or longer than the context window, and when
        the model computes no numbers.
        """
        ids = self._checked(ids)
        if len(ids) > self.context_window_size:
            raise UserError.one(
                f"{len(ids)} tokens do not fit into the context window of "
                f"{self.context_window_size}",
                fix="score the text in parts",
            )
        if self.has_work:
            raise RuntimeError("iter_logits while requests are running")
        size = chunk or max(1, _SCORE_BYTES // (4 * self.vocab_size))
        size = min(size, self._runtime.score_chunk)
        sequence = self._store.acquire_empty()
        try:
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                if not self._store.make_room(self._store.new_pages(start, len(part))):
                    raise UserError.one("the KV cache is full", fix="load with more memory")
                logits = self._runtime.score(sequence.id, part)
                if not np.isfinite(logits).all():
                    raise UserError.one(
                        "the model computed logits that are not finite numbers",
                        fix="build the checkpoint as q0f32 to see whether float16 overflows",
                    )
                yield logits
        finally:
            self._store.remove(sequence)

    def score_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """All of `iter_logits` at once: float32 [T, V]; row t predicts token t + 1."""
        return np.concatenate(list(self.iter_logits(ids)))

    # -------------------------------------------------------------------------------- inside

    def _checked(self, ids: Sequence[int]) -> list[int]:
        out = [int(i) for i in ids]
        if not all(0 <= i < self.vocab_size for i in out):
            raise UserError.one(f"token ids must be from 0 to {self.vocab_size - 1}")
        return out

    def _stop_rules(self, params: SamplingParams) -> tuple[frozenset[int], tuple[str, ...]]:
        """Token ids and strings that end an answer: the model's own, and the request's."""
        ids, strings = frozenset(params.stop_token_ids), tuple(params.stop)
        if params.ignore_eos:
            return ids, strings
        own_ids, own_strings = self.tokenizer.stop_rules()
        eos = self.config.get("eos_token_id")
        # mlc_llm writes id 2 where a model names no end; only a special token can be one.
        eos_ids = self.tokenizer.special_ids.intersection(eos if isinstance(eos, list) else [eos])
        return ids | own_ids | eos_ids, (*own_strings, *strings)

    def _prefill(self, parts: Sequence[tuple[Request, int]]) -> list[Delta]:
        now = time.perf_counter()
        batch = []
        for request, count in parts:
            answer = _answer(request)
            if answer.started is None:
                answer.started = now
                answer.stats.cached_tokens = request.reused
            first = len(request.tokens) - request.pending
            batch.append((_sequence_id(request), request.tokens[first : first + count]))
        logits = self._runtime.prefill(batch)
        for request, count in parts:
            self._scheduler.appended(request, count)
        complete = [i for i, (request, _) in enumerate(parts) if request.pending == 0]
        return self._choose([parts[i][0] for i in complete], logits[complete])

    def _decode(self, requests: Sequence[Request]) -> list[Delta]:
        logits = self._runtime.decode(
            [_sequence_id(r) for r in requests], [r.tokens[-1] for r in requests]
        )
        for request in requests:
            self._scheduler.appended(request, 1)
        return self._choose(requests, logits)

    def _choose(self, requests: Sequence[Request], logits: np.ndarray) -> list[Delta]:
        if not requests:
            return []
        states = [_answer(request).sampler for request in requests]
        tokens = sample(logits, states, self.tokenizer.size)
        return [self._extend(r, t) for r, t in zip(requests, tokens, strict=True)]

    def _extend(self, request: Request, token: int) -> Delta:
        """A new token of an answer: its text, and whether it is the last."""
        answer, now = _answer(request), time.perf_counter()
        request.tokens.append(token)
        answer.stats.completion_tokens += 1
        if answer.first_token is None:
            answer.first_token = now
            answer.stats.prefill_seconds = now - (answer.started or now)
        answer.stats.decode_seconds = now - answer.first_token
        answer.fresh_ids.append(token)
        if token in answer.stop_ids:
            return self._finish(request, "", "stop")
        text, stopped = answer.stops.push(answer.detokenizer.push(token))
        if stopped:
            return self._finish(request, text, "stop", flush=False)
        if len(request.tokens) >= answer.length_limit:
            return self._finish(request, text, "length")
        return self._delta(request, text, None)

    def _finish(self, request: Request, text: str, reason: str, *, flush: bool = True) -> Delta:
        answer = _answer(request)
        if flush:
            tail, stopped = answer.stops.push(answer.detokenizer.flush())
            text += tail if stopped else tail + answer.stops.flush()
        self._scheduler.finish(request)
        self._requests.pop(request.id, None)
        return self._delta(request, text, reason)

    def _delta(self, request: Request, text: str, reason: str | None) -> Delta:
        answer = _answer(request)
        ids, answer.fresh_ids = tuple(answer.fresh_ids), []
        return Delta(request.id, text, ids, reason, answer.stats)


def _answer(request: Request) -> _Answer:
    answer: _Answer = request.payload
    return answer


def _sequence_id(request: Request) -> int:
    if request.sequence is None:
        raise RuntimeError(f"request {request.id} is not running")
    return request.sequence.id
