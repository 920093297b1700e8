"""Our engine on folders that mlc_llm makes, of families that mlcawq knows nothing of.

It is driven by what a library exports and says of itself, so that a family needs no entry of ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mlc_families import make_family
from mlc_steps import run_step
from transformers import AutoModelForCausalLM

from mlcawq.engine.engine import Engine
from mlcawq.engine.sampling import SamplingParams

pytestmark = pytest.mark.mlc_llm

# Of the logits, relative to their size; float16 activations, and logits that mlc_llm rounds too.
TOLERANCE = 2e-2


def build(python: Path, checkpoint: Path, quantization: str, out: Path) -> Path:
    words = (checkpoint, "--quantization", quantization, "-o", out)
    sizes = ("--context-window-size=256", "--prefill-chunk-size=64", "--max-batch-size=3")
    run_step(python, "gen_config", *words, "--conv-template", "chatml", *sizes)
    run_step(python, "convert_weight", *words, "--device", "cpu")
    run_step(python, "compile", out, "--device", "cpu", "-o", out / "lib-cpu.so")
    return out


def check_logits(engine: Engine, model: torch.nn.Module, ids: list[int]) -> None:
    """Prefill in chunks, decoding, and batches of both, against PyTorch."""
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].float().numpy()

    def check(got: np.ndarray, *positions: int) -> None:
        for row, position in zip(got, positions, strict=True):
            want = expected[position]
            assert np.linalg.norm(row - want) < TOLERANCE * np.linalg.norm(want), position

    check(engine.score_tokens(ids), *range(len(ids)))
    runtime = engine._runtime
    for sequence in (101, 102, 103):
        runtime.add_sequence(sequence)
    check(runtime.prefill([(101, ids[:50])]), 49)
    check(runtime.decode([101], ids[50:51]), 50)
    check(runtime.prefill([(101, ids[51:60]), (102, ids[:7]), (103, ids[:33])]), 59, 6, 32)
    check(runtime.decode([103, 101, 102], [ids[33], ids[60], ids[7]]), 33, 60, 7)
    for sequence in (101, 102, 103):
        runtime.remove_sequence(sequence)


def test_gemma2(mlc_python: Path, tmp_path: Path) -> None:
    # mlc_llm scales attention by head_dim, whatever query_pre_attn_scalar is.
    checkpoint = make_family(tmp_path / "checkpoint", "gemma2", query_pre_attn_scalar=32)
    engine = Engine(build(mlc_python, checkpoint, "q0f16", tmp_path / "built"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 100).tolist()
    check_logits(engine, model, ids)
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answer = list(engine.generate([{"role": "user", "content": "Hello"}], greedy))
    assert answer[-1].finish_reason == "length"
    assert answer[-1].stats.completion_tokens == 5
