"""Whole builds with a packed head: verified, what rounding costs told, mismatches refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlcawq.build.pipeline import BuildRequest, BuildResult, build
from mlcawq.build.rounded_reference import compute_reference
from mlcawq.checkpoint.config import read_config
from mlcawq.engine.artifact import check_library, read_folder
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.errors import UserError
from mlcawq.graph.tables import PLAIN, Table, Tables
from mlcawq.inspection import describe
from tests.awq_checkpoints import make_awq_checkpoint
from tests.build.test_rounded_table import with_own_head
from tests.tiny_models import make_tiny_model

IDS = [[5, 17, 301, 88, 2, 5, 399, 0, 120, 7]]
INT8 = Table(8, 128)

Make = Callable[..., tuple[Path, BuildResult]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tiny model, tied or not, built with a head; (checkpoint, result)."""

    def made(*, tie: bool, head: str | None, own: bool = False) -> tuple[Path, BuildResult]:
        plain = make_tiny_model(tmp_path / "plain", "qwen3", tie=tie)
        checkpoint, _ = make_awq_checkpoint(plain, tmp_path / "awq", 32)
        if own:
            with_own_head(checkpoint)
        request = BuildRequest(target="cpu:native", head=head, context_window_size=256)
        return checkpoint, build(checkpoint, tmp_path / "out", request)

    return made


def logits_of(folder: Path) -> np.ndarray:
    runtime = ModelRuntime(read_folder(folder), "cpu", max_total_tokens=64)
    runtime.add_sequence(0)
    return runtime.score(0, IDS[0])


def check(checkpoint: Path, result: BuildResult, tables: Tables) -> None:
    """Verified against the tables as they are stored; their rounding told as it is."""
    assert result.tables == tables
    verification = result.verification
    assert verification is not None
    assert verification.worst < 5e-3
    config = json.loads((result.folder / "mlc-chat-config.json").read_text())
    assert {key: config[key] for key in tables.names()} == tables.names()
    built, model = read_folder(result.folder), read_config(checkpoint)
    plain = compute_reference(checkpoint, built, model, PLAIN, IDS)
    rounded = compute_reference(checkpoint, built, model, tables, IDS)
    assert plain.loss is None
    assert rounded.loss is not None
    got, expected = logits_of(result.folder), plain.logits[0]
    away = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert away == pytest.approx(rounded.loss.relative_error, rel=0.1)
    told = verification.rounding
    assert told is not None
    assert told.kl is not None
    assert told.kl > 0
    assert told.relative_error == pytest.approx(away, rel=0.5)
    assert told.tokens > len(IDS[0])


def test_untied_int4(make: Make, tmp_path: Path) -> None:
    checkpoint, result = make(tie=False, head="int4")
    check(checkpoint, result, Tables(Table(4, 32), INT8))
    found = describe(result.folder)
    assert found.problems == []
    assert (found.facts["head"], found.facts["embedding"]) == ("int4_g32", "int8_g128")
    # Weights of one kind of head and a library for another never meet.
    other = Path(shutil.copytree(result.folder, tmp_path / "other"))
    config = json.loads((other / "mlc-chat-config.json").read_text())
    metadata = {**config, "head": "int8_g128", "params": []}
    with pytest.raises(UserError, match=r"head is 'int8_g128' here but 'int4_g32'"):
        check_library(read_folder(other), metadata, other / "lib-cpu.so")
    del config["head"]
    (other / "mlc-chat-config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"head is 'int4_g32' here but 'plain'"):
        ModelRuntime(read_folder(other), "cpu", max_total_tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tie", "head", "tables"),
    [
        (True, None, Tables(INT8, INT8)),
        (True, "int4", Tables(Table(4, 32), Table(4, 32))),
        (False, None, Tables(INT8, INT8)),
    ],
)
def test_other_heads(make: Make, tie: bool, head: str | None, tables: Tables) -> None:
    checkpoint, result = make(tie=tie, head=head)
    check(checkpoint, result, tables)


@pytest.mark.slow
def test_a_head_of_the_checkpoints_own(make: Make) -> None:
    checkpoint, result = make(tie=False, head=None, own=True)
    check(checkpoint, result, Tables(Table(4, 32), INT8))


@pytest.mark.slow
def test_a_float16_head(make: Make) -> None:
    _, result = make(tie=True, head="float16")
    assert result.tables == PLAIN
    assert result.verification is not None
    assert result.verification.rounding is None


def test_only_the_cpu_has_kernels_for_it(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    checkpoint, _ = make_awq_checkpoint(plain, tmp_path / "awq", 32)
    for own in (False, True):
        if own:
            with_own_head(checkpoint)
        head = None if own else "int8"
        request = BuildRequest(target="vulkan:portable", head=head, verify=False)
        with pytest.raises(UserError, match="the output head is quantized") as caught:
            build(checkpoint, tmp_path / "out", request)
        assert "--target cpu" in str(caught.value)
