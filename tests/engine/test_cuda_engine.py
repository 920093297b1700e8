"""A model built for NVIDIA GPUs, run by the engine on the stub driver: everything but arithmetic.

What kernels compute is tested where they are; here it is that the library is made and found, that
TVM's runtime takes it, what is launched for a token, and how a GPU that does not fit is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from awq_checkpoints import make_awq_checkpoint
from cuda_stub import Answer, StubMachine, can_be_built
from tiny_models import make_tiny_model

from mlcawq.build.compile import compile_model
from mlcawq.build.pipeline import BuildRequest, BuildResult, build
from mlcawq.checkpoint.config import read_config
from mlcawq.inspection.describe import describe

pytestmark = pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")

LAYERS = 2
SIZES = {"context_window_size": 512, "prefill_chunk_size": 32, "max_batch_size": 4}

_RUN = """
import os, sys
from pathlib import Path
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime
runtime = ModelRuntime(read_folder(Path(sys.argv[1])))
print("device", runtime.device.name, "capacity", runtime.capacity)

def mark(name):
    with open(os.environ["STUB_LOG"], "a") as log:
        print("mark", name, file=log)

runtime.add_sequence(0)
mark("prefill")
runtime.prefill([(0, [1, 2, 3, 4, 5])])
for i in range(3):
    mark(f"decode{i}")
    runtime.decode([0], [7])
mark("prefill_second")
runtime.add_sequence(1)
runtime.prefill([(1, [3, 4])])
for i in range(3):
    mark(f"batch{i}")
    runtime.decode([0, 1], [7, 8])
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> StubMachine:
    return StubMachine(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cuda")
    plain = make_tiny_model(root / "plain", layers=LAYERS)
    return make_awq_checkpoint(plain, root / "awq", 128)[0]


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> BuildResult:
    """Built on a machine without a GPU."""
    return build(
        checkpoint, checkpoint.with_name("built"), BuildRequest(target="cuda:sm_80", **SIZES)
    )


@pytest.fixture(scope="module")
def answer(built: BuildResult, machine: StubMachine) -> Answer:
    answer = machine.run(_RUN, built.folder, capability=86, memory=2**30)
    assert answer.status == 0, answer.output
    return answer


def part(answer: Answer, name: str) -> list[tuple[str, str]]:
    """What was launched from the mark `name` to the next: (launch or graph, kernel)."""
    calls = list(answer.calls)
    start = next(i for i, call in enumerate(calls) if (call.what, call.name) == ("mark", name))
    rest = calls[start + 1 :]
    end = next((i for i, call in enumerate(rest) if call.what == "mark"), len(rest))
    return [(c.what, c.name) for c in rest[:end] if c.what in ("launch", "captured", "graph")]


def test_a_build_for_a_gpu_that_is_elsewhere(built: BuildResult) -> None:
    assert built.library == "lib-cuda.so"
    assert built.weight_layout == "n16k64"
    assert built.verification is None
    assert built.unverified
    config = json.loads((built.folder / "mlc-chat-config.json").read_text())
    assert config["weight_layout"] == "n16k64"


def test_the_library_is_looked_into_without_a_gpu(built: BuildResult) -> None:
    found = describe(built.folder)
    assert found.problems == []
    assert "for cuda sm_80" in str(found.facts["library for cuda"])


def test_the_engine_finds_the_gpu_by_itself(answer: Answer) -> None:
    assert "device cuda:0" in answer.output
    assert len(answer.named("module")) == 1


def test_decoding_replays_graphs_between_attention(answer: Answer) -> None:
    first, second, third = (part(answer, f"decode{i}") for i in range(3))
    assert ("graph", "instantiated") in first
    assert second == third
    assert ("graph", "instantiated") not in second
    # Between two attention calls, and before and after all of them; the first block's residual is
    # the function's own input, where a graph has to begin anew.
    assert second.count(("graph", "launched")) == LAYERS + 2
    launched = [name for what, name in second if what == "launch"]
    linears = [name for name in launched if "w4a16" in name or "silu" in name]
    assert linears == []
    assert len(launched) <= 4 * LAYERS + 6, launched


def test_two_sequences_have_graphs_of_their_own(answer: Answer) -> None:
    first, second, third = (part(answer, f"batch{i}") for i in range(3))
    assert ("graph", "instantiated") in first
    assert second == third
    assert second.count(("graph", "launched")) == LAYERS + 2
    prefill = part(answer, "prefill_second")
    assert all(what == "launch" for what, _ in prefill)


def test_decoding_allocates_nothing(answer: Answer) -> None:
    calls = list(answer.calls)
    marks = {call.name: i for i, call in enumerate(calls) if call.what == "mark"}
    steps = calls[marks["decode1"] : marks["prefill_second"]] + calls[marks["batch1"] :]
    assert [call for call in steps if call.what == "malloc"] == []


def test_the_cache_takes_what_the_gpu_has(
    answer: Answer, built: BuildResult, machine: StubMachine
) -> None:
    """512 tokens for each of 4 sequences, or what fits beside what TVM's cache takes for itself."""
    full = 4 * SIZES["context_window_size"]
    assert f"capacity {full + 16}" in answer.output
    tight = machine.run(_RUN, built.folder, capability=80, memory=2**27 + 2**20)
    assert tight.status == 0, tight.output
    capacity = int(tight.output.split("capacity")[1].split()[0])
    assert 32 <= capacity < full
    tiny = machine.run(_RUN, built.folder, capability=80, memory=2**27)
    assert tiny.status != 0
    assert "cuda:0 has room for 0 tokens only" in tiny.output


@pytest.mark.parametrize(("capability", "name"), [(75, "sm_75"), (90, "sm_90")])
def test_a_gpu_that_does_not_run_the_library(
    built: BuildResult, machine: StubMachine, capability: int, name: str
) -> None:
    answer = machine.run(_RUN, built.folder, capability=capability)
    assert answer.status != 0
    assert f"compiled for sm_80, and cuda:0 is {name}" in answer.output
    assert f"mlcawq compile {built.folder} --target cuda:{name}" in answer.output


@pytest.mark.slow
def test_every_kernel_of_a_library_for_hopper_keeps_its_registers(
    checkpoint: Path, tmp_path: Path
) -> None:
    library = compile_model(
        read_config(checkpoint),
        tmp_path / "lib-cuda.so",
        "cuda:sm_90",
        weight_layout="n16k64",
        **SIZES,
    )
    assert library.metadata["target"]["arch"] == "sm_90a"
    assert len(library.kernels) > 20
    spilling = [kernel for kernel in library.kernels if kernel.spill_stores or kernel.spill_loads]
    assert spilling == []
