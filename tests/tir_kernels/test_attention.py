"""Attention over rows and over pages against numpy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random
from tests.tir_kernels.int8_slots import Stored
from tests.tir_kernels.kernels import relative_error

PAGE = 16
TOLERANCE = {"float16": 1e-3, "float32": 1e-5}
# Heads, key heads, head_dim, dtype: groups of 1 to 8 and more, every head_dim that models have.
SHAPES = [(7, 1, 64, "float16"), (3, 3, 20, "float16")]
GPU_SHAPES = [(3, 3, 80, "float16"), (14, 2, 128, "float16"), (2, 1, 128, "float32")]
MORE_SHAPES = [
    (4, 2, 32, "float16"),
    (2, 1, 64, "float16"),
    (8, 1, 96, "float16"),
    (9, 1, 128, "float16"),
    (24, 2, 64, "float16"),
    *((group, 1, 128, "float16") for group in (1, 2, 3, 4, 5, 6, 8)),
    (2, 1, 256, "float16"),
    (1, 1, 256, "float32"),
    (4, 4, 20, "float32"),
    (6, 2, 112, "float16"),
]


def expected_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """out [n, h, d] and lse in base 2 [n, h] of q [n, h, d] over k, v [m, h_kv, d]."""
    n, heads, d = q.shape
    m, kv_heads, _ = k.shape
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (x.repeat(heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * d**-0.5
    if causal:
        hidden = np.arange(m)[None] > (m - n) + np.arange(n)[:, None]
        scores[:, hidden] = -np.inf
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    lse = (largest + np.log(total))[..., 0].T / np.log(2)
    return np.einsum("hqk,khd->qhd", weights / total, v), lse


def indptr(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


class Pages:
    """Random keys and values of several sequences, in pages that lie in no order. What no sequence
    has written is NaN.
    """

    def __init__(self, lengths: list[int], kv_heads: int, rng: Random, stored: Stored) -> None:
        d, dtype = stored.d, stored.dtype
        counts = [-(-length // PAGE) for length in lengths]
        total = sum(counts) + 3
        self.stored = stored
        self.pages = np.full((total, 2, kv_heads, PAGE, stored.size), np.nan, dtype)
        self.values = rng.permutation(total).astype(np.int32)[: sum(counts)]
        self.indptr = indptr(counts)
        self.last = np.array([(n - 1) % PAGE + 1 if n else 0 for n in lengths], np.int32)
        self.lengths = lengths
        for b, length in enumerate(lengths):
            for i in range(length):
                page = self.values[self.indptr[b] + i // PAGE]
                slots = stored.packed(rng.floats(2, kv_heads, d, dtype=dtype))
                self.pages[page, :, :, i % PAGE] = slots

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """What kernels are told of the pages, and of offsets for a rotation that is none."""
        unused = np.zeros(len(self.lengths), np.int32)
        pages = self.stored.pages(self.pages)
        return pages, self.indptr, self.values, self.last, unused

    def keys_and_values(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        mine = self.pages[self.values[self.indptr[b] : self.indptr[b + 1]]]
        flat = mine.transpose(1, 0, 3, 2, 4).reshape(2, -1, mine.shape[2], mine.shape[4])
        keys, values = (self.stored.unpacked(x[: self.lengths[b]]) for x in flat)
        return keys, values

    def check(self, b: int, q: np.ndarray, out: np.ndarray, lse: np.ndarray, seed: int) -> None:
        """out [n, h, d] and lse [n, h] are attention of q over sequence b."""
        if self.lengths[b] == 0:  # nothing to attend to: no weight in a merge
            assert (out == 0).all()
            assert (lse < -4e4).all()
            return
        want, want_lse = expected_attention(q, *self.keys_and_values(b), causal=False)
        assert relative_error(out, want) < TOLERANCE[str(q.dtype)], (b, seed)
        allowed = self.stored.lse_error
        np.testing.assert_allclose(lse, want_lse, atol=allowed, err_msg=f"{b}, {seed}")


def check_ragged(
    backend: Backend,
    heads: int,
    kv_heads: int,
    d: int,
    dtype: str,
    lengths: list[int],
    rng: Random,
    int8: str | None = None,
) -> None:
    stored = Stored(d, dtype, int8)
    function = backend.kernels.attention_prefill_ragged(
        backend.target, heads, kv_heads, d, dtype, **stored.options
    )
    kernel = backend.compile(function)
    n, at = sum(lengths), indptr(lengths)
    q, k, v = (rng.floats(n, h, d, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    slots = stored.packed(k), stored.packed(v)
    k, v = (stored.unpacked(x) for x in slots)
    unused = np.zeros(n, np.int32), np.zeros(len(lengths), np.int32)
    for causal in (True, False):
        seen = stored.outputs(n, heads)
        kernel(stored.queries(q), at, *slots, at, *unused, *seen, int(causal), 0, 1.0, 1e4, d**-0.5)
        out, lse = stored.real(seen[0], heads, d), stored.real(seen[1], heads)
        for a, b in itertools.pairwise(at):
            want, want_lse = expected_attention(q[a:b], k[a:b], v[a:b], causal=causal)
            assert relative_error(out[a:b], want) < TOLERANCE[dtype], (a, b, rng.seed)
            allowed = stored.lse_error
            np.testing.assert_allclose(lse[a:b], want_lse, atol=allowed, err_msg=str(rng.seed))


def check_paged(
    backend: Backend,
    heads: int,
    kv_heads: int,
    d: int,
    dtype: str,
    lengths: list[int],
    new: list[int],
    rng: Random,
    int8: str | None = None,
) -> None:
    """`new` queries of each sequence over the `lengths` keys that it has in pages."""
    stored = Stored(d, dtype, int8)
    cache = Pages(lengths, kv_heads, rng, stored)
    at = indptr(new)
    q = rng.floats(sum(new), heads, d, dtype=dtype)
    seen = stored.outputs(len(q), heads)
    function = backend.kernels.attention_prefill_paged(
        backend.target, heads, kv_heads, d, dtype, **stored.options
    )
    positions = np.zeros(len(q), np.int32)
    numbers = 1.0, 1e4, d**-0.5
    backend.compile(function)(
        stored.queries(q), at, *cache.tables, positions, *seen, 0, 0, *numbers
    )
    out, lse = stored.real(seen[0], heads, d), stored.real(seen[1], heads)
    for b, (first, last) in enumerate(itertools.pairwise(at)):
        rows = slice(first, last)
        cache.check(b, q[rows], out[rows], lse[rows], rng.seed)


def check_decode(
    backend: Backend,
    heads: int,
    kv_heads: int,
    d: int,
    dtype: str,
    lengths: list[int],
    rng: Random,
    int8: str | None = None,
    **options: int,
) -> None:
    stored = Stored(d, dtype, int8)
    cache = Pages(lengths, kv_heads, rng, stored)
    batch = len(lengths)
    q = rng.floats(batch, heads, d, dtype=dtype)
    seen = stored.outputs(batch, heads)
    function = backend.kernels.attention_decode_paged(
        backend.target, heads, kv_heads, d, dtype, **stored.options, **options
    )
    positions = np.zeros(batch, np.int32)
    backend.compile(function)(
        stored.queries(q), *cache.tables, positions, *seen, 0, 1.0, 1e4, d**-0.5
    )
    out, lse = stored.real(seen[0], heads, d), stored.real(seen[1], heads)
    for b in range(batch):
        cache.check(b, q[b : b + 1], out[b : b + 1], lse[b : b + 1], rng.seed)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), SHAPES)
def test_ragged(
    backend: Backend, heads: int, kv_heads: int, d: int, dtype: str, rng: Random
) -> None:
    check_ragged(backend, heads, kv_heads, d, dtype, [70, 1, 33], rng)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), SHAPES)
def test_paged_prefill_and_decode(
    backend: Backend, heads: int, kv_heads: int, d: int, dtype: str, rng: Random
) -> None:
    check_paged(backend, heads, kv_heads, d, dtype, [5, 0, 150, 64], [3, 7, 40, 1], rng)
    check_decode(backend, heads, kv_heads, d, dtype, [5, 0, 150, 64], rng)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), GPU_SHAPES)
def test_gpu_shapes(
    gpu: Backend, heads: int, kv_heads: int, d: int, dtype: str, rng: Random
) -> None:
    check_decode(gpu, heads, kv_heads, d, dtype, [16, 17, 193], rng)
    check_ragged(gpu, heads, kv_heads, d, dtype, [19], rng)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads", "d", "dtype"), [*GPU_SHAPES, *MORE_SHAPES])
def test_more_gpu_shapes(
    gpu: Backend, heads: int, kv_heads: int, d: int, dtype: str, rng: Random
) -> None:
    check_decode(gpu, heads, kv_heads, d, dtype, [1, 63, 64, 65, 0, 300], rng)
    check_ragged(gpu, heads, kv_heads, d, dtype, [1, 100, 16, 32], rng)
    check_paged(gpu, heads, kv_heads, d, dtype, [100, 1, 0, 33], [5, 64, 1, 1], rng)


def test_decode_with_fewer_blocks_than_spans(gpu: Backend, rng: Random) -> None:
    # Two blocks for each of the two key heads and two sequences: each has several spans.
    check_decode(gpu, 4, 2, 32, "float16", [500, 90], rng, most_blocks=8)


def test_merging_two_halves_is_attention_over_all(backend: Backend, rng: Random) -> None:
    heads, d = 14, 80
    q = rng.floats(5, heads, d, dtype="float32")
    k, v = (rng.floats(40, 2, d, dtype="float32") for _ in range(2))
    want, want_lse = expected_attention(q, k, v, causal=False)
    halves = [
        expected_attention(q, k[part], v[part], causal=False)
        for part in (slice(15), slice(15, None))
    ]
    out, lse, other, other_lse = (x.astype(np.float32) for half in halves for x in half)
    merge = backend.kernels.merge_state(backend.target, heads, d, "float32")
    backend.compile(merge)(out, lse, other, other_lse)
    assert relative_error(out, want) < 1e-5, rng.seed
    np.testing.assert_allclose(lse, want_lse, atol=1e-4, err_msg=str(rng.seed))
