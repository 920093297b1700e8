"""Logits belong to who asked for them: they are not copied, and nobody writes into them again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime


def test_logits_outlive_the_steps_that_follow(built: Path) -> None:
    runtime = ModelRuntime(read_folder(built), "cpu", max_total_tokens=256)
    runtime.add_sequence(0)
    steps = [lambda: runtime.prefill([(0, [1, 2, 3])]), lambda: runtime.score(0, [4, 5])]
    steps += [lambda token=token: runtime.decode([0], [token]) for token in range(8)]
    kept = [step() for step in steps]
    copies = [logits.copy() for logits in kept]
    for logits in kept:
        logits *= -1  # as penalties do: in place
    again = [runtime.decode([0], [token]) for token in range(8)]
    for logits, copy in zip(kept, copies, strict=True):
        assert logits.dtype == np.float32
        assert np.isfinite(copy).all()
        np.testing.assert_array_equal(logits, -copy)
    assert not any(np.shares_memory(a, b) for a in kept for b in again)
    # What was written into them is in no later step's either.
    runtime.clear()
    runtime.add_sequence(0)
    runtime.prefill([(0, [1, 2, 3, 4, 5, *range(8)])])
    for token, logits in enumerate(again):
        np.testing.assert_allclose(runtime.decode([0], [token]), logits, rtol=1e-3, atol=1e-3)
