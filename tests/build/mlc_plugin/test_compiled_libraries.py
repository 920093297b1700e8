"""Libraries that mlc_llm compiles through the plug-in, run beside our own and beside PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlc_libraries import SIZES, built_by_mlc_llm, case, compiled

from mlcawq.build.compile import compile_model
from mlcawq.build.cpu_target import native_target, without_tiles
from mlcawq.build.targets import target_record
from tests.graph.built_library import (
    build_weights,
    check_batches_of_different_lengths,
    check_prefill_in_chunks_then_decode,
    check_verify_fork_and_rollback,
    error,
)

pytestmark = pytest.mark.mlc_llm


def native_cpu() -> dict[str, object]:
    record = target_record(without_tiles(native_target()))
    return {**record, "host": record}


@pytest.mark.parametrize(
    ("family", "group_size"), [("llama", 128), ("qwen2", 64), ("qwen3", 32), ("mistral", 128)]
)
def test_cpu_library_computes_what_ours_does(
    mlc_python: Path, tmp_path: Path, family: str, group_size: int
) -> None:
    ours = build_weights(case(family, group_size), tmp_path)
    compiled_here = compile_model(ours.config, ours.folder / "ours.so", "cpu:native", **SIZES)
    ours = replace(ours, library=compiled_here.path)
    theirs = built_by_mlc_llm(mlc_python, ours, tmp_path)
    theirs = replace(theirs, library=compiled(mlc_python, theirs, "theirs.so", native_cpu()))
    check_prefill_in_chunks_then_decode(theirs, (1, 7, 300), 16)
    check_batches_of_different_lengths(theirs)
    check_verify_fork_and_rollback(theirs)

    drivers = [theirs.driver(), ours.driver()]
    for driver in drivers:
        driver.add(0)
    ids = ours.ids
    for start, end in ((0, 100), (100, 140), (140, 141)):
        got, expected = (driver.prefill(0, ids[start:end]) for driver in drivers)
        assert error(got, expected) < 5e-3
    got, expected = (
        np.stack([driver.decode(0, token) for token in ids[141:149]]) for driver in drivers
    )
    assert error(got, expected) < 5e-3


def test_stock_mlc_llm_computes_the_same(mlc_python: Path, tmp_path: Path) -> None:
    built = build_weights(case("llama", 128), tmp_path)
    built = built_by_mlc_llm(mlc_python, built, tmp_path)
    stock = compiled(mlc_python, built, "stock.so", native_cpu(), "--stock")
    check_prefill_in_chunks_then_decode(replace(built, library=stock), (7, 300), 8)
