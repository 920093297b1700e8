"""Which sequences run next, and which pages of the KV cache they use. No tensors here.

Continuous batching (Yu et al. 2022, "Orca") on a paged cache (Kwon et al. 2023,
arXiv:2309.06180): requests wait in order of arrival, start when the cache has pages for their
whole prompt, prefill in chunks that fill the model's chunk size together, and decode as one
batch. When decoding runs out of pages the request that started last is put back; it is
recomputed later, and its answer is the same.

What a finished request leaves in the cache stays there until the pages are needed. A new request
takes over the longest common beginning it finds, so a chat prefills only what was added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class PagedCache(Protocol):
    """What the scheduler needs of the KV cache; ModelRuntime is one."""

    def available_pages(self) -> int: ...
    def add_sequence(self, sequence: int) -> None: ...
    def remove_sequence(self, sequence: int) -> None: ...
    def fork_sequence(self, parent: int, child: int, position: int) -> None: ...
    def pop(self, sequence: int, count: int) -> None: ...


@dataclass
class CachedSequence:
    """A sequence of the KV cache and the tokens whose keys and values it holds."""

    id: int
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One answer being generated.

    tokens: prompt and answer so far. The last ones, from len(sequence.tokens) on, are not in
    the cache yet: one while decoding, more while prefilling.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    payload: Any = None
    sequence: CachedSequence | None = None
    reused: int = 0  # tokens found in the cache at the first start

    @property
    def pending(self) -> int:
        return len(self.tokens) - (len(self.sequence.tokens) if self.sequence else 0)

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and len(self.tokens) > self.prompt_length


class SequenceStore:
    """The cache's sequences: those of running requests, and idle ones kept for reuse."""

    def __init__(self, cache: PagedCache, page_size: int, *, max_idle: int = 16) -> None:
        self._cache = cache
        self._page_size = page_size
        self._max_idle = max_idle
        self._idle: list[CachedSequence] = []  # least recently used first
        self._active: list[CachedSequence] = []
        self._next_id = 0

    def new_pages(self, cached: int, added: int) -> int:
        """Pages that a sequence of `cached` tokens takes when `added` tokens are appended."""
        return -(-(cached + added) // self._page_size) - -(-cached // self._page_size)

    def make_room(self, pages: int, keep: CachedSequence | None = None) -> bool:
        """Drop idle sequences, oldest first, until `pages` are free. False: not possible."""
        while self._cache.available_pages() < pages:
            victim = next((s for s in self._idle if s is not keep), None)
            if victim is None:
                return False
            self._idle.remove(victim)
            self._cache.remove_sequence(victim.id)
        return True

    def acquire(self, tokens: Sequence[int], reserve: int) -> CachedSequence | None:
        """A sequence for a request with these tokens, holding a common beginning of them.

        At least one token is left to compute, because its logits are wanted. None when the
        cache has no room for all the tokens and the next one beside `reserve` pages.
        """
        source, length = self._longest_match(tokens)
        if source is not None and self._takes_over(source, length):
            # Cutting into a page that is shared with another sequence copies that page.
            if self.make_room(1, keep=source):
                self._truncate(source, length)
            else:
                source, length = None, 0
        while True:
            need = self.new_pages(length, len(tokens) + 1 - length) + reserve
            if self.make_room(need, keep=source):
                return self._start(source, length)
            if source is None or source in self._active:
                return None
            source, length = None, 0  # what would be reused is itself in the way

    def release(self, sequence: CachedSequence) -> None:
        """A request is done with it: keep it for reuse."""
        self._active.remove(sequence)
        if not sequence.tokens:
            self._cache.remove_sequence(sequence.id)
            return
        self._idle.append(sequence)
        while len(self._idle) > self._max_idle:
            self._cache.remove_sequence(self._idle.pop(0).id)

    def remove(self, sequence: CachedSequence) -> None:
        """A request gives up its pages."""
        self._active.remove(sequence)
        self._cache.remove_sequence(sequence.id)

    def acquire_empty(self) -> CachedSequence:
        """A sequence of nobody's request, to be removed by the caller."""
        return self._start(None, 0)

    def forget_all(self) -> None:
        """The cache has been cleared."""
        self._idle.clear()
        self._active.clear()

    def _longest_match(self, tokens: Sequence[int]) -> tuple[CachedSequence | None, int]:
        best: CachedSequence | None = None
        best_length = 0
        for sequence in (*self._active, *self._idle):
            length = common_prefix(sequence.tokens, tokens[:-1])
            # An idle sequence as good as a running one costs nothing to take over.
            if length > best_length or (length == best_length > 0 and sequence in self._idle):
                best, best_length = sequence, length
        if best is not None and not self._takes_over(best, best_length):
            best_length = self._whole_pages(best_length)  # pages are what a fork shares
        return (best, best_length) if best_length else (None, 0)

    def _takes_over(self, sequence: CachedSequence, length: int) -> bool:
        """Continue an idle sequence in place, unless that would lose most of it."""
        return sequence in self._idle and 2 * length >= len(sequence.tokens)

    def _whole_pages(self, length: int) -> int:
        return length - length % self._page_size

    def _truncate(self, sequence: CachedSequence, length: int) -> None:
        self._cache.pop(sequence.id, len(sequence.tokens) - length)
        del sequence.tokens[length:]

    def _start(self, source: CachedSequence | None, length: int) -> CachedSequence:
        if source is not None and self._takes_over(source, length):
            self._idle.remove(source)
            self._active.append(source)
            return source
        sequence = CachedSequence(self._new_id())
        if source is None:
            self._cache.add_sequence(sequence.id)
        else:
            self._cache.fork_sequence(source.id, sequence.id, length)
            sequence.tokens = list(source.tokens[:length])
        self._active.append(sequence)
        return sequence

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


class Scheduler:
    """Decides what the next forward passes are. The engine runs them and reports the tokens."""

    def __init__(self, store: SequenceStore, *, max_batch: int, chunk_size: int) -> None:
        self.store = store
        self.max_batch = max_batch
        self.chunk_size = chunk_size
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of start
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def plan_prefill(self) -> list[tuple[Request, int]]:
        """Requests and the numbers of their pending tokens to append now, one chunk in all."""
        self._admit()
        parts: list[tuple[Request, int]] = []
        left = self.chunk_size
        for request in self.running:
            if left and not request.decoding:
                count = min(request.pending, left)
                parts.append((request, count))
                left -= count
        return parts

    def plan_decode(self, skip: Sequence[Request] = ()) -> tuple[list[Request], list[Request]]:
        """Requests that append their one pending token now, and those that cannot go on.

        A request cannot go on when it is alone and the cache is full. Pages promised to prompts
        that are still being prefilled are left alone.
        """
        ready = [r for r in self.running if r.decoding and r not in skip]
        while ready:
            need = sum(self.store.new_pages(len(_cached(r)), 1) for r in ready)
            if self.store.make_room(need + self._promised()):
                return ready, []
            if len(self.running) == 1:
                return [], ready
            victim = self.running[-1]
            self._preempt(victim)
            ready = [r for r in ready if r is not victim]
        return [], []

    def appended(self, request: Request, count: int) -> None:
        """A forward pass has put `count` of the request's pending tokens into the cache."""
        cached = _cached(request)
        cached.extend(request.tokens[len(cached) : len(cached) + count])

    def finish(self, request: Request) -> None:
        """The request is done or given up, running or waiting."""
        if request in self.running:
            self.running.remove(request)
            if request.sequence is not None:
                self.store.release(request.sequence)
                request.sequence = None
        else:
            self.waiting.remove(request)

    def forget_all(self) -> list[Request]:
        """The cache has been cleared: drop everything. Returns the requests that are lost."""
        lost = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.store.forget_all()
        return lost

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            reserve = self._promised() + sum(r.decoding for r in self.running)
            sequence = self.store.acquire(request.tokens, reserve)
            if sequence is None:
                return
            self.waiting.popleft()
            request.sequence = sequence
            request.reused = request.reused or len(sequence.tokens)
            self.running.append(request)

    def _promised(self) -> int:
        """Pages that running requests still need for the rest of their prompts."""
        return sum(
            self.store.new_pages(len(_cached(r)), r.pending + 1)
            for r in self.running
            if not r.decoding
        )

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        if request.sequence is not None:
            self.store.remove(request.sequence)
            request.sequence = None
        self.waiting.appendleft(request)
        self.preemptions += 1


def _cached(request: Request) -> list[int]:
    if request.sequence is None:
        raise RuntimeError(f"request {request.id} is not running")
    return request.sequence.tokens


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning, by bisection on slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] is common, a[:high] is not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
