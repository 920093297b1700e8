"""Attention over rows and over pages against numpy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.tir_kernels.kernels import HOST, Kernel, poisoned, relative_error
from tir_kernels import cpu

PAGE = 16


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "lengths"),
    [(4, 2, 32, [70, 1, 33]), (14, 2, 64, [130]), (3, 3, 20, [9, 100])],
)
def test_ragged(heads: int, kv_heads: int, d: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    kernel = Kernel(cpu.attention_prefill_ragged(HOST, heads, kv_heads, d, "float16"))
    n, at = sum(lengths), indptr(lengths)
    q, k, v = (
        rng.standard_normal((n, h, d)).astype(np.float16) for h in (heads, kv_heads, kv_heads)
    )
    unused = np.zeros(n, np.int32), np.zeros(len(lengths), np.int32)
    for causal in (True, False):
        out, lse = poisoned((n, heads, d), "float16"), poisoned((n, heads), "float32")
        kernel(q, at, k, v, at, *unused, out, lse, int(causal), 0, 1.0, 1e4, d**-0.5)
        for a, b in itertools.pairwise(at):
            want, want_lse = expected_attention(q[a:b], k[a:b], v[a:b], causal=causal)
            assert relative_error(out[a:b], want) < 1e-3
            np.testing.assert_allclose(lse[a:b], want_lse, atol=1e-4)


class Pages:
    """Random keys and values of several sequences, in pages that lie in no order."""

    def __init__(self, lengths: list[int], kv_heads: int, d: int, rng: np.random.Generator) -> None:
        counts = [-(-length // PAGE) for length in lengths]
        total = sum(counts) + 3
        self.pages = rng.standard_normal((total, 2, kv_heads, PAGE, d)).astype(np.float16)
        self.values = rng.permutation(total).astype(np.int32)[: sum(counts)]
        self.indptr = indptr(counts)
        self.last = np.array([(n - 1) % PAGE + 1 if n else 0 for n in lengths], np.int32)
        self.lengths = lengths

    def keys_and_values(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        mine = self.pages[self.values[self.indptr[b] : self.indptr[b + 1]]]
        flat = mine.transpose(1, 0, 3, 2, 4).reshape(2, -1, mine.shape[2], mine.shape[4])
        return flat[0, : self.lengths[b]], flat[1, : self.lengths[b]]


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 32), (7, 1, 64)])
def test_paged_prefill_and_decode(heads: int, kv_heads: int, d: int) -> None:
    rng = np.random.default_rng(1)
    lengths, new = [5, 0, 150, 64], [3, 7, 40, 1]
    cache = Pages(lengths, kv_heads, d, rng)
    at = indptr(new)
    q = rng.standard_normal((sum(new), heads, d)).astype(np.float16)
    batch = len(new)
    out, lse = poisoned((len(q), heads, d), "float16"), poisoned((len(q), heads), "float32")
    tables = cache.pages, cache.indptr, cache.values, cache.last, np.zeros(batch, np.int32)
    prefill = Kernel(cpu.attention_prefill_paged(HOST, heads, kv_heads, d, "float16"))
    numbers = 1.0, 1e4, d**-0.5
    prefill(q, at, *tables, np.zeros(len(q), np.int32), out, lse, 0, 0, *numbers)

    one = q[at[:-1]]
    out_one, lse_one = poisoned((batch, heads, d), "float16"), poisoned((batch, heads), "float32")
    decode = Kernel(cpu.attention_decode_paged(HOST, heads, kv_heads, d, "float16"))
    decode(one, *tables, np.zeros(batch, np.int32), out_one, lse_one, 0, *numbers)

    for b in range(batch):
        rows = slice(at[b], at[b + 1])
        if lengths[b] == 0:  # nothing to attend to: no weight in a merge
            assert (out[rows] == 0).all()
            assert (lse[rows] < -4e4).all()
            continue
        k, v = cache.keys_and_values(b)
        want, want_lse = expected_attention(q[rows], k, v, causal=False)
        assert relative_error(out[rows], want) < 1e-3
        np.testing.assert_allclose(lse[rows], want_lse, atol=1e-4)
        assert relative_error(out_one[b : b + 1], want[:1]) < 1e-3
        np.testing.assert_allclose(lse_one[b : b + 1], want_lse[:1], atol=1e-4)


def test_merging_two_halves_is_attention_over_all() -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((5, 4, 32)).astype(np.float32)
    k, v = (rng.standard_normal((40, 2, 32)).astype(np.float32) for _ in range(2))
    want, want_lse = expected_attention(q, k, v, causal=False)
    halves = [
        expected_attention(q, k[part], v[part], causal=False)
        for part in (slice(15), slice(15, None))
    ]
    out, lse, other, other_lse = (x.astype(np.float32) for half in halves for x in half)
    Kernel(cpu.merge_state(HOST, 4, 32, "float32"))(out, lse, other, other_lse)
    assert relative_error(out, want) < 1e-5
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


def test_append_to_pages() -> None:
    rng = np.random.default_rng(3)
    pages = np.zeros((3, 2, 2, PAGE, 8), np.float16)
    k, v = (rng.standard_normal((4, 2, 8)).astype(np.float16) for _ in range(2))
    Kernel(cpu.append_to_pages(HOST, 2, 8, "float16"))(
        pages, k, v, np.array([5, -1, 40, 0], np.int32)
    )
    want = np.zeros_like(pages)
    for row, slot in ((0, 5), (2, 40), (3, 0)):
        want[slot // PAGE, 0, :, slot % PAGE], want[slot // PAGE, 1, :, slot % PAGE] = (
            k[row],
            v[row],
        )
    assert (pages == want).all()
