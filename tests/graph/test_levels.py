"""One library for all levels of instruction sets: whichever runs, the logits are PyTorch's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlcawq.engine.cpu_library import LEVEL_FUNCTION, LEVEL_VARIABLE, check_processor, read_record
from mlcawq.engine.processor import this_processor
from mlcawq.inspection.models import describe_library
from tests.graph.built_library import (
    Built,
    Case,
    build,
    check_batches_of_different_lengths,
    check_prefill_in_chunks_then_decode,
    check_verify_fork_and_rollback,
)
from tir_kernels.layouts import BLOCKED
from tir_kernels.levels import levels_of

HERE = [level.name for level in this_processor().levels]
ALL = [level.name for level in levels_of(this_processor().architecture)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE, reason="no level of instruction sets is known here"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Built:
    case = Case("llama", {"layers": 1, "tie": True}, {"group_size": 64}, "q4f16_autoawq_g64")
    return build(case, tmp_path_factory.mktemp("levels"), "cpu", BLOCKED)


@pytest.fixture(params=HERE)
def forced(
    request: pytest.FixtureRequest, library: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Built:
    """The library at one level; a file of its own, since the choice is made when it is loaded."""
    monkeypatch.setenv(LEVEL_VARIABLE, request.param)
    copy = Path(shutil.copy(library.library, tmp_path / "lib-cpu.so"))
    chosen = check_processor(copy)
    assert chosen is not None
    assert chosen.name == request.param
    built = replace(library, library=copy)
    driver = built.driver()
    number = driver.vm.module.get_function(LEVEL_FUNCTION, query_imports=True)()
    assert driver.metadata["cpu_levels"][number] == request.param
    return built


def test_logits_at_every_level(forced: Built) -> None:
    check_prefill_in_chunks_then_decode(forced, (1, 7, 300), 8)
    check_batches_of_different_lengths(forced)
    check_verify_fork_and_rollback(forced)


def test_what_the_library_says_of_itself(library: Built) -> None:
    record = read_record(library.library)
    assert record is not None
    assert [variant.name for variant in record.variants] == ALL
    told = describe_library(library.library)
    assert told.problems == []
    assert told.facts["instruction sets"].endswith(f"{ALL[-1]}; {HERE[-1]} on this machine")
    assert told.facts["metadata"]["cpu_levels"] == ALL
    assert json.loads(json.dumps(told.as_json()))
