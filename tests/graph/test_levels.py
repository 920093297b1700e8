"""One library for all levels of instruction sets: whichever runs, the logits are PyTorch's."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
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
    error,
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


# A processor that has a level and none of the next one's instructions: whatever code of a higher
# level ran there would end the process (SIGILL).
_EMULATED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import numpy as np
from tests.graph.library_driver import LibraryDriver
from mlcawq.engine.cpu_library import LEVEL_FUNCTION
driver = LibraryDriver(Path({library!r}), Path({folder!r}))
level = driver.vm.module.get_function(LEVEL_FUNCTION, query_imports=True)()
driver.add(0)
logits = [driver.prefill(0, {ids!r}[:-1]), driver.decode(0, {ids!r}[-1])]
np.savez({out!r}, level=level, logits=np.stack(logits))
"""


@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None or platform.machine() != "x86_64", reason="no qemu-x86_64"
)
@pytest.mark.parametrize(("cpu", "level"), [("Nehalem", "x86-64-v2"), ("Haswell", "x86-64-v3")])
def test_a_processor_with_no_more_than_a_level(
    library: Built, cpu: str, level: str, tmp_path: Path
) -> None:
    ids, out = library.ids[:40], str(tmp_path / "out.npz")
    code = _EMULATED.format(
        path=[path for path in sys.path if path],
        library=str(library.library),
        folder=str(library.folder),
        ids=ids,
        out=out,
    )
    command = ["qemu-x86_64", "-cpu", cpu, str(Path(sys.executable).resolve()), "-c", code]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=600)
    result = np.load(out)
    assert ALL[int(result["level"])] == level
    assert error(result["logits"], library.expected[38:40]) < library.case.tolerance


def test_what_the_library_says_of_itself(library: Built) -> None:
    record = read_record(library.library)
    assert record is not None
    assert [variant.name for variant in record.variants] == ALL
    told = describe_library(library.library)
    assert told.problems == []
    assert told.facts["instruction sets"].endswith(f"{ALL[-1]}; {HERE[-1]} on this machine")
    assert told.facts["metadata"]["cpu_levels"] == ALL
    assert json.loads(json.dumps(told.as_json()))
