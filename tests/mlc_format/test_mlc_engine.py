"""MLC's engine, as `engine.MlcEngine` retells it, on our libraries and on mlc_llm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from transformers import AutoModelForCausalLM

from mlcawq.build.compile import compile_model
from mlcawq.checkpoint.config import read_config
from mlcawq.engine.devices import Missing, find_device
from tests.built_model import BATCH, CHUNK, CONTEXT, built_tiny_llama
from tests.graph.built_library import error
from tests.mlc_format.engine import MlcEngine
from tests.mlc_steps import run_step
from tests.tiny_models import make_tiny_model
from tests.vulkan_device import needs_vulkan

EXACT = 1e-5
# mlc_llm stores float32 parameters as bfloat16.
ROUNDED = 2e-2


def vulkan() -> Any:
    device = find_device("vulkan")
    assert not isinstance(device, Missing)
    return device.tvm


def expected_logits(checkpoint: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def serve(engine: MlcEngine, ids: list[int], expected: np.ndarray, tolerance: float) -> None:
    """What requests make the engine do: chunks, batches, decoding, a shared beginning, rollback."""

    def check(logits: Any, *positions: int) -> None:
        got = engine.flat(logits).numpy()
        assert len(got) == len(positions)
        for row, position in zip(got, positions, strict=True):
            assert error(row, expected[position]) < tolerance, position

    for sequence in (0, 1):
        engine.add(sequence)
    check(engine.batch_prefill({0: ids[:CHUNK]}), CHUNK - 1)
    check(engine.batch_prefill({0: ids[CHUNK : CHUNK + 9], 1: ids[:20]}), CHUNK + 8, 19)
    check(engine.batch_decode({0: ids[CHUNK + 9], 1: ids[20]}), CHUNK + 9, 20)
    check(engine.batch_decode({1: ids[21]}), 21)
    engine.fork(0, 2, 16)  # another prompt with the same beginning
    check(engine.batch_prefill({2: ids[16:30]}), 29)
    engine.pop(1, 5)
    check(engine.batch_prefill({1: ids[17:19]}), 18)
    assert engine.total_length() == CHUNK + 10 + 19 + 30
    if engine.gpu_sampler:  # our libraries for GPUs have no attention over trees of drafts
        return
    check(engine.batch_verify({1: ids[19:24], 2: ids[30:33]}), *range(19, 24), *range(30, 33))
    engine.accept({1: 1, 2: 2})  # two of the five drafts, all three
    check(engine.batch_decode({1: ids[21], 2: ids[33]}), 21, 33)


def choose(engine: MlcEngine, ids: list[int], expected: np.ndarray) -> np.ndarray:
    """The logit processor: biases, penalties, masks, then probabilities [2, vocabulary]."""
    engine.add(8)
    engine.add(9)
    logits = engine.flat(engine.batch_prefill({8: ids[:7], 9: ids[:11]}))
    want = np.stack([expected[6], expected[10]]).astype(np.float64)
    engine.apply_bias(logits, {(0, 5): 3.0, (1, 7): -2.0})
    want[0, 5] += 3
    want[1, 7] -= 2
    engine.apply_penalties(logits, 1, {4: 1, 7: 3}, (0.5, 0.25, 1.5))
    for token, times in ((4, 1), (7, 3)):
        value = want[1, token] - 0.5 - 0.25 * times
        want[1, token] = value * 1.5 if value < 0 else value / 1.5
    engine.apply_mask(logits, 0, range(0, 400, 3))
    want[0, [t for t in range(engine.vocabulary) if t % 3]] = -np.inf
    probs = engine.probabilities(logits, [0.0, 0.5]).numpy()
    assert np.argmax(want[0]) == np.argmax(probs[0])
    assert probs[0].max() == 1
    weights = np.exp((want[1] - want[1].max()) / 0.5)
    np.testing.assert_allclose(probs[1], weights / weights.sum(), atol=0.02)
    return probs


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(1).integers(0, 400, 100).tolist()


def test_our_library(ids: list[int]) -> None:
    checkpoint, folder = built_tiny_llama()
    expected = expected_logits(checkpoint, ids)
    serve(MlcEngine(folder, folder / "lib-cpu.so"), ids, expected, EXACT)
    choose(MlcEngine(folder, folder / "lib-cpu.so"), ids, expected)


def test_rows_of_drafts(ids: list[int]) -> None:
    _, folder = built_tiny_llama()
    engine = MlcEngine(folder, folder / "lib-cpu.so")
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    held = tvm.runtime.tensor(table)
    rows, out = tvm.runtime.tensor(np.array([3, 1], np.int32)), tvm.runtime.empty((2, 3))
    for what in ("probs", "hidden_states"):
        engine.function(f"gather_{what}")(held, rows, out)
        np.testing.assert_array_equal(out.numpy(), table[[3, 1]])
    engine.function("scatter_probs")(tvm.runtime.tensor(table[:2]), rows, held)
    np.testing.assert_array_equal(held.numpy()[[3, 1]], table[:2])


@needs_vulkan
def test_drawing_on_a_gpu(ids: list[int], tmp_path: Path) -> None:
    checkpoint, folder = built_tiny_llama()
    sizes = {"context_window_size": CONTEXT, "prefill_chunk_size": CHUNK, "max_batch_size": BATCH}
    library = compile_model(read_config(checkpoint), tmp_path / "lib.so", "vulkan", **sizes).path
    engine = MlcEngine(folder, library, vulkan(), gpu_sampler=True)
    expected = expected_logits(checkpoint, ids)
    serve(engine, ids, expected, EXACT)

    engine = MlcEngine(folder, library, vulkan(), gpu_sampler=True)
    p = choose(engine, ids, expected)
    probs = tvm.runtime.tensor(p, vulkan())
    likeliest = int(p[0].argmax())
    order = np.argsort(-p[1], kind="stable")
    sums = np.cumsum(p[1, order])
    u = float(sums[:2].mean())  # within the second of the likeliest tokens
    assert engine.draw_before_top_p(probs, [1.0, 1.0], [0.4, u]) == [likeliest, order[1]]
    # A nucleus of one token leaves no choice.
    assert engine.draw(probs, [1.0, sums[0] / 2], [0.4, 0.99]) == [likeliest, order[0]]
    tokens, taken, top, which = engine.draw_with_logprobs(probs, [0.4, 0.7], [1, 3])
    in_order = np.cumsum(p[1].astype(np.float64))
    assert tokens == [likeliest, int(np.argmax(in_order > 0.7 * in_order[-1]))]
    np.testing.assert_array_equal(taken, p[[0, 1], tokens])
    assert which.tolist() == [likeliest, *order[:3]]
    np.testing.assert_array_equal(top, [1, *p[1, order[:3]]])


@pytest.mark.mlc_llm
def test_mlc_llms_own_library(ids: list[int], mlc_python: Path, tmp_path: Path) -> None:
    """The same steps on what mlc_llm compiles: what this driver does is what its library wants."""
    checkpoint = make_tiny_model(tmp_path / "model", dtype="float32", config_form=4)
    folder = tmp_path / "built"
    words = (checkpoint, "--quantization", "q0f32", "-o", folder)
    sizes = ("--context-window-size=256", f"--prefill-chunk-size={CHUNK}", "--max-batch-size=4")
    run_step(mlc_python, "--stock", "gen_config", *words, "--conv-template", "chatml", *sizes)
    run_step(mlc_python, "--stock", "convert_weight", *words, "--device", "cpu")
    library = folder / "lib-cpu.so"
    run_step(mlc_python, "--stock", "compile", folder, "--device", "cpu", "-o", library)
    expected = expected_logits(checkpoint, ids)
    serve(MlcEngine(folder, library), ids, expected, ROUNDED)
    theirs = choose(MlcEngine(folder, library), ids, expected)
    own = built_tiny_llama()[1]  # of the same checkpoint
    ours = choose(MlcEngine(own, own / "lib-cpu.so"), ids, expected)
    np.testing.assert_allclose(ours, theirs, atol=0.02)
