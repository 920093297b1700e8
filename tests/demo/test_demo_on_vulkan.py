"""The demo model on Vulkan, be it in software: it computes and answers as on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from awq_checkpoints import make_awq_checkpoint
from vulkan_device import needs_vulkan

from mlcawq.build.pipeline import BuildRequest, BuildResult, build
from mlcawq.engine.engine import Engine
from mlcawq.engine.sampling import SamplingParams
from mlcawq.errors import UserError
from mlcawq.inspection import describe

pytestmark = needs_vulkan

DEMO = Path(__file__).parents[2] / "demo"
QUESTIONS = 6


@dataclass(frozen=True)
class Demo:
    """The same AWQ checkpoint built for two targets; questions that it was not trained on."""

    cpu: BuildResult
    vulkan: BuildResult
    questions: tuple[str, ...]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    # Rounded, not searched for: which 4-bit weights they are does not matter here.
    checkpoint, _ = make_awq_checkpoint(DEMO / "model", root / "awq", 128)
    sizes = {"context_window_size": 512, "prefill_chunk_size": 128, "max_batch_size": 2}
    built = [
        build(checkpoint, root / target.partition(":")[0], BuildRequest(target=target, **sizes))
        for target in ("cpu:native", "vulkan")
    ]
    rows = (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    step = len(rows) // QUESTIONS
    questions = tuple(json.loads(row)["question"] for row in rows[::step][:QUESTIONS])
    return Demo(built[0], built[1], questions)


def answers(folder: Path, device: str, questions: tuple[str, ...]) -> list[str]:
    engine = Engine(folder, device, max_batch=1, max_total_tokens=256)
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    return [
        "".join(
            delta.text for delta in engine.generate([{"role": "user", "content": question}], greedy)
        )
        for question in questions
    ]


def test_its_logits_are_as_close_to_the_reference(demo: Demo) -> None:
    assert demo.vulkan.weight_layout == "n16k64"
    assert demo.cpu.verification is not None
    assert demo.vulkan.verification is not None, demo.vulkan.unverified
    # Both are float16 with fp32 sums, and differ in the order of the sums only.
    assert demo.vulkan.verification.worst < 1.5 * demo.cpu.verification.worst


def test_its_answers_are_those_of_the_cpu(demo: Demo) -> None:
    said = answers(demo.vulkan.folder, "vulkan", demo.questions)
    assert said == answers(demo.cpu.folder, "cpu", demo.questions)
    assert all(said)


def test_what_it_is_can_be_told_without_a_gpu(demo: Demo) -> None:
    found = describe(demo.vulkan.folder)
    assert found.problems == []
    assert found.facts["weight_layout"] == "n16k64"
    assert found.facts["library for vulkan"].endswith("; for webgpu; fits")


def test_a_library_for_the_other_layout_is_refused(demo: Demo, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(demo.cpu.folder, tmp_path / "mixed"))
    shutil.copy(demo.vulkan.folder / demo.vulkan.library, mixed)
    with pytest.raises(UserError, match=r"weight_layout is 'n16k64' here but 'n16k8'"):
        Engine(mixed, "vulkan")


def test_chat_takes_the_only_library_there_is(demo: Demo) -> None:
    question = demo.questions[0]
    command = [sys.executable, "-X", "importtime", "-m", "mlcawq", "chat", str(demo.vulkan.folder)]
    done = subprocess.run(
        [*command, "--prompt", question, "--temperature", "0", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["device"] == "vulkan:0"
    assert [document["answer"]] == answers(demo.cpu.folder, "cpu", (question,))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tvm.runtime" in imported
    assert not imported & {"torch._C", "transformers", "tvm.relax", "mlcawq.build"}
