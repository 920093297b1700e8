"""Tiny models built into libraries, and what every library must get right, on any device.

A library is compared with a float32 PyTorch model that holds the same (dequantized) weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mlcawq.build.compile import compile_model
from mlcawq.build.convert_weight import convert_weight
from mlcawq.checkpoint.config import ModelConfig, read_config
from tests.awq_checkpoints import make_awq_checkpoint
from tests.graph.library_driver import LibraryDriver
from tests.tiny_models import make_tiny_model


@dataclass(frozen=True)
class Case:
    """A family with its quirks. awq: make_awq_checkpoint's options, None to stay unquantized.
    quantization: what the build must make of it; asked: that it is told to.
    """

    family: str
    model: dict[str, Any]
    awq: dict[str, Any] | None
    quantization: str
    tolerance: float = 1e-2
    asked: bool = False


@dataclass(frozen=True)
class Built:
    """library: a file, or an executable that was never one."""

    case: Case
    config: ModelConfig
    folder: Path
    library: Any
    ids: list[int]
    expected: np.ndarray  # logits [len(ids), vocabulary]
    device: Any = None

    def driver(self) -> LibraryDriver:
        return LibraryDriver(self.library, self.folder, device=self.device)


def build(
    case: Case,
    root: Path,
    target: Any = "cpu:native",
    layout: str | None = None,
    device: Any = None,
) -> Built:
    """A library for `target` of a random model, in `root`."""
    built = build_weights(case, root, layout)
    compiled = compile_model(
        built.config,
        root / "library.so",
        target,
        case.quantization if case.asked else None,
        prefill_chunk_size=256,
        max_batch_size=3,
        weight_layout=layout,
    )
    assert compiled.metadata["quantization"] == case.quantization
    return replace(built, library=compiled.path, device=device)


def build_weights(case: Case, root: Path, layout: str | None = None, tokens: int = 600) -> Built:
    """All but the library."""
    plain = make_tiny_model(root / "plain", case.family, **case.model)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    checkpoint = plain
    if case.awq is not None:
        checkpoint, state = make_awq_checkpoint(plain, root / "awq", **case.awq)
        model.load_state_dict(state, strict=False)
    config = read_config(checkpoint)
    asked = case.quantization if case.asked else None
    converted = convert_weight(
        checkpoint, root / "built", asked, weight_layout=layout, head="float16"
    )
    assert converted.quantization == case.quantization
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    return Built(case, config, root / "built", None, ids, expected)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def check_prefill_in_chunks_then_decode(
    built: Built, lengths: tuple[int, ...] = (1, 7, 128, 513), steps: int = 64
) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    for sequence, length in enumerate(lengths):
        driver.add(sequence)
        for start in range(0, length, 256):
            chunk = ids[start : min(start + 256, length)]
            logits = driver.prefill(sequence, chunk)
            assert error(logits, built.expected[start + len(chunk) - 1]) < tolerance
        if length in lengths[1::2]:
            rows = slice(length, length + steps)
            got = np.stack([driver.decode(sequence, token) for token in ids[rows]])
            assert error(got, built.expected[rows]) < tolerance
        driver.remove(sequence)


def check_batches_of_different_lengths(built: Built) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    lengths = {0: 5, 1: 40, 2: 17}
    for sequence in lengths:
        driver.add(sequence)
    logits = driver.batch_prefill({s: ids[:n] for s, n in lengths.items()})
    for row, n in zip(logits, lengths.values(), strict=True):
        assert error(row, built.expected[n - 1]) < tolerance
    # A second chunk on top of the cache, of other lengths, one sequence left out.
    more = {0: 30, 2: 3}
    logits = driver.batch_prefill({s: ids[lengths[s] : lengths[s] + n] for s, n in more.items()})
    for row, (sequence, n) in zip(logits, more.items(), strict=True):
        lengths[sequence] += n
        assert error(row, built.expected[lengths[sequence] - 1]) < tolerance
    for _ in range(4):
        logits = driver.batch_decode({s: ids[n] for s, n in lengths.items()})
        for row, n in zip(logits, lengths.values(), strict=True):
            assert error(row, built.expected[n]) < tolerance
        lengths = {s: n + 1 for s, n in lengths.items()}


def check_verify_fork_and_rollback(built: Built) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    driver.add(0)
    logits = driver.batch_verify(0, ids[:20])
    assert error(logits, built.expected[:20]) < tolerance
    # A fork shares the pages of its prefix, the last of them half full.
    driver.fork(0, 1, 20)
    assert error(driver.decode(1, ids[20]), built.expected[20]) < tolerance
    assert error(driver.decode(0, ids[20]), built.expected[20]) < tolerance
    driver.popn(0, 5)
    assert error(driver.prefill(0, ids[16:30]), built.expected[29]) < tolerance
