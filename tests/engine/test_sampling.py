"""The sampler against slow, obvious references, and against transformers' own processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from mlcawq.engine.sampling import SamplerState, SamplingParams, candidates, sample
from mlcawq.errors import UserError


def random_logits(seed, size=50):
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def hf_probabilities(logits, params):
    """transformers' warpers in the order in which `generate` applies them."""
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    warpers = [hf.TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    for warp in warpers:
        scores = warp(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed in range(3):
        logits = random_logits(seed)
        ids, probs = candidates(logits, params)
        full = np.zeros_like(logits, np.float64)
        full[ids] = probs
        np.testing.assert_allclose(full, hf_probabilities(logits, params), atol=1e-9)


def test_nucleus_by_definition_on_large_vocabularies():
    for seed in range(5):
        logits = random_logits(seed, 5000)
        probs = np.exp(logits.astype(np.float64) - logits.max())
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        total, nucleus = 0.0, []
        for token in order:
            nucleus.append(token)
            total += probs[token]
            if total >= 0.8:
                break
        ids, _ = candidates(logits, SamplingParams(top_p=0.8))
        assert sorted(nucleus) == list(ids)


@pytest.mark.parametrize("sorted_at_once", [4, 64, 10**6])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999999])
def test_the_first_of_equal_tokens_are_in_the_nucleus(top_p, sorted_at_once, monkeypatch):
    monkeypatch.setattr("mlcawq.engine.sampling._SORTED", sorted_at_once)
    for seed in range(10):
        logits = np.round(random_logits(seed, 3000) / 3)  # a dozen values
        probs = np.exp(logits.astype(np.float64))
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        count = int(np.searchsorted(np.cumsum(probs[order]), top_p - 1e-12)) + 1
        ids, kept = candidates(logits, SamplingParams(top_p=top_p))
        assert list(ids) == sorted(order[:count])
        np.testing.assert_allclose(kept, probs[ids] / probs[ids].sum(), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 3000])
def test_a_draw_is_the_inverse_of_the_distribution(size):
    logits = random_logits(size, size)
    logits[1::3] = -np.inf  # never chosen, also where a draw is as large as can be
    running = np.cumsum(candidates(logits, SamplingParams())[1])
    state = SamplerState(SamplingParams(), [], size)
    for point in [*np.random.default_rng().random(300), 0.0, np.nextafter(1.0, 0.0)]:
        state.rng = SimpleNamespace(random=lambda point=point: point)
        token = sample(logits[None], [state], size)[0]
        assert np.isfinite(logits[token])
        assert running[token] >= point - 1e-12
        assert token == 0 or running[token - 1] <= point + 1e-12


def test_sampling_leaves_the_logits_as_they_are():
    logits = random_logits(0)[None]
    before = logits.copy()
    params = SamplingParams(top_p=0.9, logit_bias={3: 5.0}, repetition_penalty=1.5, seed=1)
    sample(logits, [SamplerState(params, [1, 2], 50)], 50)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution():
    params = SamplingParams(temperature=1.3, top_k=6, seed=0)
    logits = random_logits(1, 12)
    state = SamplerState(params, [], 12)
    n = 20000
    counts = np.zeros(12)
    for _ in range(n):
        counts[sample(logits[None], [state], 12)[0]] += 1
    expected = hf_probabilities(logits, params) * n
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001; the seed is fixed


def test_repetition_penalty_is_that_of_transformers():
    logits, seen = random_logits(2), [3, 3, 17, 40]
    state = SamplerState(SamplingParams(repetition_penalty=1.7), seen[:2], 50)
    for token in seen[2:]:
        state.record(token)
    ours = logits.copy()
    state.penalize(ours)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([seen]), torch.tensor(logits)[None]
    )
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only():
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: -100.0, 2: 1.5}
    )
    state = SamplerState(params, [1, 2, 3], 10)
    for token in (4, 4, 4, 5):
        state.record(token)
    logits = np.zeros(10, np.float32)
    state.penalize(logits)
    expected = np.zeros(10, np.float32)
    expected[4], expected[5], expected[9], expected[2] = -0.5 - 0.75, -0.5 - 0.25, -100, 1.5
    np.testing.assert_allclose(logits, expected)


def test_greedy_and_seeds_do_not_depend_on_the_batch():
    rows = np.stack([random_logits(s) for s in range(4)])
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(seed=1),
    ]

    def states():
        return [SamplerState(p, [], 50) for p in params]

    together, alone = states(), states()
    for _ in range(20):
        batch = sample(rows, together, 50)
        assert batch[0] == rows[0].argmax()
        assert batch == [sample(rows[i : i + 1], [alone[i]], 50)[0] for i in range(4)]


def test_padding_ids_are_never_chosen():
    logits = np.zeros((1, 50), np.float32)
    logits[0, 30:] = 100
    for temperature in (0.0, 1.0):
        state = SamplerState(SamplingParams(temperature=temperature, seed=0), [], 50)
        assert all(sample(logits, [state], 30)[0] < 30 for _ in range(20))


def test_ids_that_cannot_be_chosen_are_left_out_of_the_penalties():
    params = SamplingParams(
        temperature=0, logit_bias={1: 100.0, 7: 100.0}, repetition_penalty=2.0, presence_penalty=1.0
    )
    state = SamplerState(params, [0, 7], 8)
    state.record(6)
    assert sample(np.ones((1, 8), np.float32), [state], 5) == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = np.full((2, 8), bad if bad == -np.inf else 0.0, np.float32)
    logits[1, 3] = bad
    states = [SamplerState(SamplingParams(), [], 8) for _ in range(2)]
    with pytest.raises(UserError, match="not finite"):
        sample(logits, states, 8)


def test_tiny_temperatures_do_not_overflow():
    ids, probs = candidates(random_logits(0), SamplingParams(temperature=1e-8))
    assert probs.max() == 1.0
    assert np.isfinite(probs).all()
    assert ids.size == 50


def test_every_bad_parameter_is_named_at_once():
    with pytest.raises(UserError) as error:
        SamplingParams(
            temperature=-1,
            top_p=0,
            top_k=-1,
            min_p=2,
            repetition_penalty=0,
            presence_penalty=3,
            frequency_penalty=float("nan"),
            seed=-1,
            max_tokens=0,
            stop=[""],
            stop_token_ids=[-1],
            logit_bias={1: 1000},
        )
    assert len(error.value.problems) == 12
    with pytest.raises(UserError, match=r"mlc-chat-config\.json"):
        SamplingParams.from_config({"temperature": -2, "unrelated": 1})
    with pytest.raises(UserError, match="ids end at 7"):
        SamplerState(SamplingParams(logit_bias={8: 1}), [], 8)


def test_defaults_and_overrides():
    params = SamplingParams.from_config({"temperature": 0.7, "top_p": None, "top_k": 20})
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 1.0, 20)
    assert SamplingParams.from_config({"top_k": -1}).top_k == 0
    assert params.override(temperature=0.0, top_k=None).temperature == 0.0
    assert params.override(temperature=0.0, top_k=None).top_k == 20
