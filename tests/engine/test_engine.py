"""The engine on a really built model, against PyTorch and against itself alone."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlcawq.engine.engine import Engine
from mlcawq.engine.sampling import SamplingParams
from mlcawq.errors import UserError

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def logits_of(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].numpy()


def random_ids(seed, count):
    return np.random.default_rng(seed).integers(3, 400, count).tolist()


def answer(engine, prompt, params=GREEDY):
    deltas = list(engine.generate(prompt, params))
    ids = [i for d in deltas for i in d.token_ids]
    return ids, "".join(d.text for d in deltas), deltas[-1]


def assert_greedy(reference, prompt, ids):
    """Every token is the reference's likeliest one, but for ties within rounding."""
    logits = logits_of(reference, [*prompt, *ids])[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(ids)), ids]
    assert (chosen >= logits.max(axis=1) - 1e-3).all()


def run_all(engine, prompts, params):
    numbers = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
    ids = {n: [] for n in numbers}
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            ids[delta.request] += delta.token_ids
        steps += 1
    return [ids[n] for n in numbers], steps


@pytest.mark.parametrize("count", [1, 31, 32, 33, 200, 256])
def test_scores_are_those_of_pytorch(engine, reference, count):
    ids = random_ids(count, count)
    expected = logits_of(reference, ids)
    ours = engine.score_tokens(ids)
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


def test_scores_do_not_depend_on_the_chunks(engine):
    ids = random_ids(0, 77)
    whole = engine.score_tokens(ids)
    chunks = list(engine.iter_logits(ids, chunk=10))
    assert [len(c) for c in chunks] == [10] * 7 + [7]
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-4)


@pytest.mark.parametrize("length", [1, 16, 32, 33, 100, 220])
def test_greedy_answers_are_those_of_pytorch(engine, reference, length):
    prompt = random_ids(length, length)
    ids, _, last = answer(engine, prompt)
    assert len(ids) == 24
    assert last.finish_reason == "length"
    assert_greedy(reference, prompt, ids)


def test_a_chat_is_encoded_with_the_template_and_decoded_to_its_text(engine, reference):
    messages = [{"role": "user", "content": "Where is Paris?"}]
    prompt = engine.encode(messages)
    assert engine.tokenizer._tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, text, last = answer(engine, messages)
    assert_greedy(reference, prompt, ids)
    assert text == engine.tokenizer.decode(ids).rstrip("\ufffd")
    assert last.stats.prompt_tokens == len(prompt)
    assert last.stats.completion_tokens == len(ids)
    assert last.stats.decode_tokens_per_second > 0


def test_a_chat_has_the_ids_of_transformers(engine, checkpoint):
    hugging_face = AutoTokenizer.from_pretrained(checkpoint)
    texts = ("Hi", "", "  two\n\nlines \n", "Größe 東京 🙂", "<think>", "1+1=2; don't!")
    for count in (1, 3, 5):
        roles = ("user", "assistant", "user", "assistant", "user")
        for shift in range(len(texts)):
            messages = [
                {"role": role, "content": texts[(shift + i) % len(texts)]}
                for i, role in enumerate(roles[:count])
            ]
            for system in ([], [{"role": "system", "content": "Be brief."}]):
                expected = hugging_face.apply_chat_template(
                    [*system, *messages], add_generation_prompt=True, return_dict=False
                )
                assert engine.encode([*system, *messages]) == expected


def test_random_load_answers_as_pytorch_does(built, reference):
    """Requests that share beginnings come and go while the cache is too small for them."""
    preemptions = checked = 0
    for seed in range(6):
        rng = random.Random(seed)
        engine = Engine(
            built,
            max_total_tokens=rng.choice([256, 320, 400]),
            chunk_size=rng.choice([5, 16, 32]),
            max_batch=rng.choice([2, 3, 4]),
        )
        beginnings = [random_ids(1000 * seed + i, 100) for i in range(3)]
        prompts, answers, left = {}, {}, 20
        while left or engine.has_work:
            if left and rng.random() < 0.4:
                prompt = rng.choice(beginnings)[: rng.randrange(1, 100)] + random_ids(left, 5)
                if answers and rng.random() < 0.4:  # the next turn of an earlier one
                    earlier = rng.choice(list(answers))
                    prompt = prompts[earlier] + answers[earlier] + prompt[:8]
                params = GREEDY.override(max_tokens=rng.randrange(1, 60))
                number = engine.add_request(prompt[:180], params)
                prompts[number], answers[number] = prompt[:180], []
                left -= 1
            for delta in engine.step():
                answers[delta.request] += delta.token_ids
            if rng.random() < 0.03:
                engine.abort(rng.choice(list(prompts) or [0]))
        preemptions += engine._scheduler.preemptions
        for number, ids in answers.items():
            if ids:
                assert_greedy(reference, prompts[number], ids)
                checked += 1
    assert preemptions > 0
    assert checked > 80


def test_many_requests_together_answer_as_alone(built, reference):
    engine = Engine(built)  # four at a time, ten requests: some wait for others to end
    rng = np.random.default_rng(0)
    prompts = [random_ids(100 + i, int(n)) for i, n in enumerate(rng.integers(1, 120, 10))]
    params = [GREEDY.override(max_tokens=int(n)) for n in rng.integers(1, 40, 10)]
    answers, steps = run_all(engine, prompts, params)
    assert steps < sum(p.max_tokens for p in params)  # they were batched
    for prompt, param, ids in zip(prompts, params, answers, strict=True):
        assert len(ids) == param.max_tokens
        assert_greedy(reference, prompt, ids)


def test_requests_with_a_common_beginning_share_it(built, reference):
    engine = Engine(built)
    beginning = random_ids(7, 50)
    first = engine.add_request([*beginning, 5], GREEDY)
    collected = {first: list(engine.step()[-1:])}  # 32 of 51 tokens
    engine.step()
    followers = [engine.add_request([*beginning, 6 + i], GREEDY) for i in range(3)]
    answers = {n: [] for n in (first, *followers)}
    stats = {}
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request] += delta.token_ids
            stats[delta.request] = delta.stats
    assert [stats[n].cached_tokens for n in followers] == [48, 48, 48]
    assert collected[first] == []
    for i, number in enumerate(followers):
        assert_greedy(reference, [*beginning, 6 + i], answers[number])
    # The one that was forked from goes on undisturbed; its first token came before the loop.
    own = [*beginning, 5, *logits_of(reference, [*beginning, 5])[-1:].argmax(1).tolist()]
    assert_greedy(reference, own, answers[first])


def test_requests_that_are_put_back_answer_the_same(built, reference):
    engine = Engine(built, max_total_tokens=256)
    prompts = [random_ids(i, 40) for i in range(4)]
    answers, _ = run_all(engine, prompts, [GREEDY.override(max_tokens=60)] * 4)
    assert engine._scheduler.preemptions > 0
    for prompt, ids in zip(prompts, answers, strict=True):
        assert len(ids) == 60
        assert_greedy(reference, prompt, ids)


def test_history_is_reused_and_changes_nothing(built, reference):
    engine = Engine(built, max_batch=1)
    messages = [{"role": "user", "content": "One question, quite a long one at that."}]
    _, text, _ = answer(engine, messages, GREEDY.override(max_tokens=8))
    turn = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "More"}]
    prompt = engine.encode(turn)
    ids, _, last = answer(engine, turn)
    assert last.stats.cached_tokens >= len(engine.encode(messages))
    assert_greedy(reference, prompt, ids)

    again, _, last = answer(engine, turn)  # /regen: only the last prompt token is computed
    assert last.stats.cached_tokens == len(prompt) - 1
    assert again == ids

    other = [*turn[:-1], {"role": "user", "content": "Else"}]  # branches off inside the cache
    ids, _, last = answer(engine, other)
    assert 0 < last.stats.cached_tokens < len(prompt)
    assert_greedy(reference, engine.encode(other), ids)


def test_seeds_fix_the_answer_whatever_else_runs(engine):
    params = [SamplingParams(temperature=1.5, seed=s, max_tokens=20) for s in (1, 2, 1, 3)]
    prompts = [random_ids(1, 30)] * 4
    together, _ = run_all(engine, prompts, params)
    assert together[0] == together[2]
    assert together[0] != together[1]
    for prompt, param, ids in zip(prompts, params, together, strict=True):
        assert answer(engine, prompt, param)[0] == ids


def test_the_context_ends_the_answer(engine, reference):
    prompt = random_ids(3, 250)
    ids, _, last = answer(engine, prompt, GREEDY.override(max_tokens=100))
    assert last.finish_reason == "length"
    assert len(ids) == 6
    assert_greedy(reference, prompt, ids)
    with pytest.raises(UserError, match="256 tokens, and the context window of 256"):
        answer(engine, random_ids(3, 256))
    with pytest.raises(UserError, match="257 tokens do not fit"):
        engine.score_tokens(random_ids(3, 257))


def test_stop_strings_across_tokens_are_never_shown(engine):
    ids, text, _ = answer(engine, random_ids(11, 20), GREEDY.override(max_tokens=40))
    middle = len(text) // 2
    stop = text[middle : middle + 4]
    assert sum(len(engine.tokenizer.decode([i])) >= 4 for i in ids) < len(ids)
    params = GREEDY.override(max_tokens=40, stop=(stop,))
    shorter, shown, last = answer(engine, random_ids(11, 20), params)
    assert last.finish_reason == "stop"
    assert shown == text[: text.index(stop)]
    assert len(shorter) <= len(ids)


def test_stop_tokens(engine):
    prompt = random_ids(12, 20)
    ids, _, _ = answer(engine, prompt)
    stop = ids[5]
    first = ids.index(stop)
    got, text, last = answer(engine, prompt, GREEDY.override(stop_token_ids=(stop,)))
    assert got == ids[: first + 1]
    assert last.finish_reason == "stop"
    assert text == engine.tokenizer.decode(ids[:first]).rstrip("\ufffd")


def test_the_model_s_own_end_stops_unless_ignored(engine):
    end = engine.tokenizer.token_id("<|im_end|>")
    params = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={end: 100.0})
    ids, text, last = answer(engine, random_ids(1, 5), params)
    assert (ids, text, last.finish_reason) == ([end], "", "stop")
    ids, text, last = answer(engine, random_ids(1, 5), params.override(ignore_eos=True))
    assert (ids, text, last.finish_reason) == ([end] * 5, "", "length")


def test_a_long_prompt_in_small_chunks_can_be_watched(built, reference):
    engine = Engine(built, chunk_size=16)
    prompt = random_ids(9, 100)
    deltas = list(engine.generate(prompt, GREEDY))
    assert [d.token_ids for d in deltas[:6]] == [()] * 6
    assert_greedy(reference, prompt, [i for d in deltas for i in d.token_ids])


def test_closing_an_answer_frees_its_place(built):
    engine = Engine(built, max_batch=1)
    deltas = engine.generate(random_ids(1, 100), GREEDY)
    next(deltas)
    deltas.close()
    assert not engine.has_work
    _, _, last = answer(engine, random_ids(1, 100))
    assert last.stats.cached_tokens == 32  # what the first step had prefilled


def test_wrong_requests(engine):
    with pytest.raises(UserError, match="from 0 to 399"):
        answer(engine, [400])
    with pytest.raises(UserError, match="empty"):
        answer(engine, "")
    with pytest.raises(UserError, match="logit_bias"):
        answer(engine, [5], SamplingParams(logit_bias={400: 1.0}))
    assert not engine.has_work


def test_plain_text_is_continued(engine):
    text = "The quick brown"
    assert engine.encode(text) == engine.tokenizer.encode(text)
    ids, _, _ = answer(engine, text)
    assert ids == answer(engine, engine.encode(text))[0]


def test_numbers_that_are_none_are_an_error_and_not_an_answer(own_built):
    import hashlib

    cache = json.loads((own_built / "tensor-cache.json").read_text())
    record = next(
        (shard, r)
        for shard in cache["records"]
        for r in shard["records"]
        if r["name"] == "model.norm.weight"
    )
    path = own_built / record[0]["dataPath"]
    data = bytearray(path.read_bytes())
    start = record[1]["byteOffset"]
    data[start : start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    record[0]["md5sum"] = hashlib.md5(data).hexdigest()
    (own_built / "tensor-cache.json").write_text(json.dumps(cache))
    engine = Engine(own_built)
    with pytest.raises(UserError, match="not finite"):
        answer(engine, [5, 6])
    with pytest.raises(UserError, match="not finite"):
        engine.score_tokens([5, 6])
    assert not engine.has_work


def test_a_smaller_cache_shortens_the_context_and_says_so(built):
    engine = Engine(built, max_total_tokens=64)
    assert engine.context_window_size < 256
    assert "room for" in engine.notes[0]
    ids, _, last = answer(engine, random_ids(1, 40), GREEDY.override(max_tokens=200))
    assert last.finish_reason == "length"
    assert len(ids) == engine.context_window_size - 40


def test_the_runtime_alone_is_enough(built):
    code = (
        "import sys\n"
        "from mlcawq.engine.runtime_only import import_tvm_runtime\n"
        "import_tvm_runtime()\n"
        "from mlcawq.engine.engine import Engine\n"
        "from mlcawq.engine.sampling import SamplingParams\n"
        f"engine = Engine({str(built)!r})\n"
        "deltas = engine.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))\n"
        "print([i for d in deltas for i in d.token_ids])\n"
        "assert not {'torch', 'transformers', 'tvm.relax', 'tvm.s_tir'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 4
