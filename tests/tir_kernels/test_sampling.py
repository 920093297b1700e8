"""Kernels that draw tokens on GPUs, and those that move rows, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random
from tests.tir_kernels.kernels import poisoned


def probabilities(rng: Random, rows: int, vocabulary: int) -> np.ndarray:
    """Rows of few likely tokens and many that have no probability at all."""
    p = np.exp(rng.standard_normal((rows, vocabulary)) * 4).astype(np.float32)
    p[:, rng.random(vocabulary) < 0.3] = 0
    p[-1, vocabulary // 3 :] = 0
    p[:, 0] += 1e-3  # one is never ruled out
    return p / p.sum(-1, keepdims=True)


def drawn(p: np.ndarray, u: float) -> int:
    """The token whose share of [0, 1) holds u, with sums in double precision."""
    return int(np.argmax(np.cumsum(p.astype(np.float64)) > u * p.astype(np.float64).sum()))


def near_a_border(p: np.ndarray, u: float) -> bool:
    """Is u so close to the end of a token's share that rounding may decide otherwise?"""
    sums = np.cumsum(p.astype(np.float64))
    return bool(np.abs(sums - u * sums[-1]).min() < 1e-5)


def test_multinomial(gpu: Backend, rng: Random) -> None:
    kernel = gpu.compile(gpu.kernels.multinomial_from_uniform(gpu.target))
    for vocabulary in (5, 403, 70003):
        p = probabilities(rng, 3, vocabulary)
        rows = np.array([0, 2, 1, 1, 0, 2, 1], np.int32)
        uniform = rng.random(7).astype(np.float32)
        uniform[:2] = 0, 0.99999994  # the first possible token, and the last
        tokens = poisoned(rows.shape, "int32")
        kernel(p, uniform, rows, tokens)
        for row, u, token in zip(rows, uniform, tokens, strict=True):
            assert p[row, token] > 0, rng.seed
            assert token == drawn(p[row], u) or near_a_border(p[row], u), rng.seed


def test_argsort(gpu: Backend, rng: Random) -> None:
    kernel = gpu.compile(gpu.kernels.argsort_probs(gpu.target))
    for vocabulary in (5, 403, 1024, 1025, 5003):
        p = probabilities(rng, 2, vocabulary)
        values, tokens = poisoned(p.shape, "float32"), poisoned(p.shape, "int32")
        kernel(p, values, tokens)
        want = np.argsort(-p, axis=-1, kind="stable")
        np.testing.assert_array_equal(tokens, want, err_msg=str(rng.seed))
        np.testing.assert_array_equal(values, np.take_along_axis(p, want, -1))


def test_sample_with_top_p(gpu: Backend, rng: Random) -> None:
    sample = gpu.compile(gpu.kernels.sample_with_top_p(gpu.target))
    for vocabulary in (5, 403):
        p = probabilities(rng, 2, vocabulary)
        order = np.argsort(-p, axis=-1, kind="stable").astype(np.int32)
        values = np.take_along_axis(p, order, -1)
        rows, top_p = np.array([0, 1, 1, 0, 0], np.int32), np.array([0.7, 1.0], np.float32)
        uniform = rng.random(5).astype(np.float32)
        uniform[0] = 0
        tokens = poisoned(rows.shape, "int32")
        sample(values, order, uniform, rows, top_p, tokens)
        for row, u, token in zip(rows, uniform, tokens, strict=True):
            kept = values[row].copy()
            if top_p[row] < 1:
                if near_a_border(kept, float(top_p[row])):
                    continue
                kept[int(np.argmax(np.cumsum(kept) >= top_p[row])) + 1 :] = 0
            at = order[row].tolist().index(token)
            assert kept[at] > 0, rng.seed
            assert at == drawn(kept, u) or near_a_border(kept, u), rng.seed


def test_top_p_keeps_a_sum_that_is_exact(gpu: Backend) -> None:
    values = np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)
    order = np.array([[3, 1, 0, 2]], np.int32)
    uniform, rows = np.array([0, 0.5, 0.999], np.float32), np.zeros(3, np.int32)
    tokens = poisoned((3,), "int32")
    sample = gpu.compile(gpu.kernels.sample_with_top_p(gpu.target))
    sample(values, order, uniform, rows, np.array([0.5], np.float32), tokens)
    assert tokens.tolist() == [3, 3, 3]
    sample(values, order, uniform, rows, np.array([0.75], np.float32), tokens)
    assert tokens.tolist() == [3, 3, 1]


def test_renormalize_by_top_p(gpu: Backend, rng: Random) -> None:
    renormalize = gpu.compile(gpu.kernels.renormalize_by_top_p(gpu.target))
    for vocabulary in (5, 1003):
        p = probabilities(rng, 4, vocabulary)
        p[3] = 0
        p[3, :4] = 0.25, 0.5, 0.125, 0.125  # equals of the last one that stays, stay
        top_p = np.array([0.7, 1e-5, 1.0, 0.8], np.float32)
        out = poisoned(p.shape, "float32")
        renormalize(p, top_p, np.zeros((4, 3), np.float32), out)
        for row in range(4):
            order = np.sort(p[row])[::-1].astype(np.float64)
            reached = np.cumsum(order) >= min(float(top_p[row]), order.sum() * (1 - 1e-6))
            least = order[int(np.argmax(reached))]
            want = np.where(p[row] >= least, p[row], 0)
            want /= want.sum()
            np.testing.assert_allclose(out[row], want, atol=3e-6, err_msg=str((rng.seed, row)))
        np.testing.assert_array_equal(out[3, :4], [0.25, 0.5, 0.125, 0.125])


@pytest.mark.parametrize("places", [0, 3, 300])
def test_taking_probabilities(gpu: Backend, places: int, rng: Random) -> None:
    p = probabilities(rng, 2, 50)
    order = np.argsort(-p, axis=-1, kind="stable").astype(np.int32)
    rows, tokens = np.array([1, 0], np.int32), np.array([7, 49], np.int32)
    at = rng.integers(0, 100, places).astype(np.int32)
    taken, top = poisoned((2,), "float32"), poisoned((places,), "float32")
    top_tokens = poisoned((places,), "int32")
    take = gpu.compile(gpu.kernels.sampler_take_probs(gpu.target))
    take(p, order, rows, tokens, at, taken, top, top_tokens)
    np.testing.assert_array_equal(taken, p[rows, tokens])
    np.testing.assert_array_equal(top_tokens, order.reshape(-1)[at])
    np.testing.assert_array_equal(top, p[at // 50, top_tokens])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_to_drafts_and_back(backend: Backend, dtype: str, rng: Random) -> None:
    table = rng.floats(5, 300, dtype=dtype)
    rows = np.array([4, 0, 2], np.int32)
    out = poisoned((3, 300), dtype)
    backend.compile(backend.kernels.gather_rows(backend.target, dtype))(table, rows, out)
    np.testing.assert_array_equal(out, table[rows])
    want = table.copy()
    want[rows] = out * 2
    backend.compile(backend.kernels.scatter_rows(backend.target, dtype))(out * 2, rows, table)
    np.testing.assert_array_equal(table, want)
