"""The scheduler over a simulated page pool: random loads never break the cache's rules."""

import random

import pytest

from mlcawq.engine.scheduler import Request, Scheduler, SequenceStore, common_prefix

PAGE = 4


class PagePool:
    """Pages as the paged cache counts them: forks share whole pages, the rest are a sequence's."""

    def __init__(self, pages):
        self.pages = pages
        self.sequences = {}  # id -> [page owner tokens]; a page is a list object with a count
        self.lengths = {}

    def used(self):
        return len({id(page) for pages in self.sequences.values() for page in pages})

    def available_pages(self):
        return self.pages - self.used()

    def add_sequence(self, sequence):
        assert sequence not in self.sequences
        self.sequences[sequence], self.lengths[sequence] = [], 0

    def remove_sequence(self, sequence):
        del self.sequences[sequence], self.lengths[sequence]

    def fork_sequence(self, parent, child, position):
        assert position <= self.lengths[parent]
        assert position % PAGE == 0  # the store forks at whole pages only
        self.sequences[child] = self.sequences[parent][: position // PAGE]
        self.lengths[child] = position

    def pop(self, sequence, count):
        assert 0 <= count <= self.lengths[sequence]
        self.lengths[sequence] -= count
        keep = -(-self.lengths[sequence] // PAGE)
        del self.sequences[sequence][keep:]
        if self.lengths[sequence] % PAGE and count:  # a shared page is copied before it is written
            self.sequences[sequence][-1] = [sequence]

    def append(self, sequence, count):
        self.lengths[sequence] += count
        while len(self.sequences[sequence]) * PAGE < self.lengths[sequence]:
            assert self.available_pages() > 0, "the cache ran out of pages"
            self.sequences[sequence].append([sequence])


def make(pages=64, max_batch=4, chunk=16):
    pool = PagePool(pages)
    return pool, Scheduler(SequenceStore(pool, PAGE), max_batch=max_batch, chunk_size=chunk)


def run_step(pool, scheduler, lengths, log=None):
    """One engine step: prefill, decode, and a made-up next token for whoever is complete."""
    done = []

    def advance(request):
        request.tokens.append(1000 + len(request.tokens))
        if len(request.tokens) - request.prompt_length >= lengths[request.id]:
            scheduler.finish(request)
            done.append(request)

    parts = scheduler.plan_prefill()
    assert sum(count for _, count in parts) <= scheduler.chunk_size
    for request, count in parts:
        assert count > 0
        pool.append(request.sequence.id, count)
        scheduler.appended(request, count)
    for request, _ in parts:
        if request.pending == 0:
            advance(request)
    ready, stuck = scheduler.plan_decode([r for r, _ in parts])
    assert not stuck
    for request in ready:
        assert request.pending == 1
        pool.append(request.sequence.id, 1)
    for request in ready:
        scheduler.appended(request, 1)
        advance(request)
    assert len(scheduler.running) <= scheduler.max_batch
    for request in scheduler.running:
        assert pool.lengths[request.sequence.id] == len(request.sequence.tokens)
        assert request.tokens[: len(request.sequence.tokens)] == request.sequence.tokens
    if log is not None:
        log.append((parts, ready))
    return done


def request(number, tokens):
    return Request(number, list(tokens), len(tokens))


def test_random_loads_finish_and_never_overflow():
    for seed in range(60):
        rng = random.Random(seed)
        pool, scheduler = make(pages=rng.randrange(12, 40), max_batch=rng.randrange(1, 6))
        most = pool.pages * PAGE
        shared = [rng.randrange(3) for _ in range(30)]
        waiting, lengths = [], {}
        for number in range(30):
            prompt = shared[: rng.randrange(30)] + [
                rng.randrange(3) for _ in range(rng.randrange(1, 12))
            ]
            lengths[number] = rng.randrange(1, min(20, most - len(prompt)))
            waiting.append(request(number, prompt))
        finished = 0
        for _ in range(5000):
            if waiting and rng.random() < 0.4:
                scheduler.add(waiting.pop())
            finished += len(run_step(pool, scheduler, lengths))
            if finished == 30:
                break
        assert finished == 30
        assert not scheduler.running
        assert not scheduler.waiting


def test_requests_start_in_order_and_decode_together():
    pool, scheduler = make(max_batch=3)
    for number in range(5):
        scheduler.add(request(number, [number] * 4))
    lengths = dict.fromkeys(range(5), 3)
    log = []
    order = [r.id for _ in range(20) for r in run_step(pool, scheduler, lengths, log)]
    assert order == [0, 1, 2, 3, 4]
    assert [len(ready) for _, ready in log[:3]] == [0, 3, 3]


def test_a_long_prompt_is_cut_into_chunks_while_others_decode():
    pool, scheduler = make(chunk=16)
    scheduler.add(request(0, [1, 2, 3]))
    lengths = {0: 10, 1: 2}
    log = []
    run_step(pool, scheduler, lengths, log)
    scheduler.add(request(1, range(100, 140)))
    for _ in range(4):
        run_step(pool, scheduler, lengths, log)
    assert [[count for _, count in parts] for parts, _ in log] == [[3], [16], [16], [8], []]
    assert [[r.id for r in ready] for _, ready in log] == [[], [0], [0], [0], [0, 1]]


def test_the_latest_request_is_put_back_and_resumed_when_pages_run_out():
    pool, scheduler = make(pages=10, max_batch=3)
    for number in range(3):
        scheduler.add(request(number, [number] * 8))
    lengths = dict.fromkeys(range(3), 20)
    order = [r.id for _ in range(100) for r in run_step(pool, scheduler, lengths)]
    assert order == [0, 1, 2]
    assert scheduler.preemptions > 0


def test_a_lone_request_in_a_full_cache_is_reported():
    pool, scheduler = make(pages=2)
    scheduler.add(request(0, [1] * 7))
    run_step(pool, scheduler, {0: 99})
    run_step(pool, scheduler, {0: 99})
    ready, stuck = scheduler.plan_decode()
    assert ready == []
    assert [r.id for r in stuck] == [0]


def test_the_next_turn_takes_over_the_sequence():
    pool, scheduler = make()
    scheduler.add(request(0, range(20)))
    for _ in range(10):
        done = run_step(pool, scheduler, {0: 5})
        if done:
            break
    answered = done[0].tokens
    follow = request(1, [*answered, 7, 7, 7])
    scheduler.add(follow)
    parts = scheduler.plan_prefill()
    # The answer's last token was never fed to the model; the rest is in the cache.
    assert follow.reused == len(answered) - 1
    assert parts == [(follow, 4)]
    assert len(pool.sequences) == 1


def test_the_same_prompt_again_computes_one_token():
    pool, scheduler = make()
    for number in range(2):
        scheduler.add(request(number, range(20)))
        while not run_step(pool, scheduler, dict.fromkeys(range(2), 3)):
            pass
    scheduler.add(request(2, range(20)))
    assert [count for _, count in scheduler.plan_prefill()] == [1]


def test_a_common_beginning_with_a_running_request_is_forked_at_a_page():
    pool, scheduler = make()
    scheduler.add(request(0, range(14)))
    run_step(pool, scheduler, {0: 50})
    second = request(1, [*range(10), 99])
    scheduler.add(second)
    run_step(pool, scheduler, {0: 50, 1: 50})
    assert second.reused == 8
    assert pool.used() < 4 + 3 + 2


def test_a_short_overlap_does_not_destroy_a_long_idle_sequence():
    pool, scheduler = make()
    scheduler.add(request(0, range(40)))
    while not run_step(pool, scheduler, {0: 1}):
        pass
    scheduler.add(request(1, [*range(9), 99]))
    while not run_step(pool, scheduler, {1: 1}):
        pass
    again = request(2, range(40))
    scheduler.add(again)
    scheduler.plan_prefill()
    assert again.reused == 39


def test_idle_sequences_give_way_least_recent_first():
    pool, scheduler = make(pages=8)
    for number in range(2):
        scheduler.add(request(number, [number] * 10))
        while not run_step(pool, scheduler, {number: 1}):
            pass
    assert len(pool.sequences) == 2
    scheduler.add(request(2, [2] * 15))
    scheduler.plan_prefill()
    survivor = request(3, [1] * 10)
    scheduler.add(survivor)
    assert len(pool.sequences) == 2
    scheduler.plan_prefill()
    assert survivor.reused == 9


def test_finishing_a_waiting_request():
    _, scheduler = make()
    waiting = request(0, [1])
    scheduler.add(waiting)
    scheduler.finish(waiting)
    assert not scheduler.waiting


@pytest.mark.parametrize("seed", range(50))
def test_common_prefix(seed):
    rng = random.Random(seed)
    a = [rng.randrange(2) for _ in range(rng.randrange(12))]
    b = a[: rng.randrange(len(a) + 1)] + [rng.randrange(2) for _ in range(rng.randrange(4))]
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(a, b) == expected
