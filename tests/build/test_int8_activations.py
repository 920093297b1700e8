"""Whole builds whose linears round activations to 8 bits: the library does, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlcawq.build.chat_config import read_chat_config
from mlcawq.build.compare_logits import LIMITS
from mlcawq.build.pipeline import BuildRequest, build, compile_folder, generate_config
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.errors import UserError
from mlcawq.graph.settings import check_activations
from mlcawq.inspection import describe
from tests.awq_checkpoints import make_awq_checkpoint
from tests.tiny_models import make_tiny_model
from tir_kernels import dispatch
from tir_kernels._tvm import Target
from tir_kernels.layouts import AUTOAWQ, BLOCKED

IDS = [5, 17, 301, 88, 2, 5, 399, 0, 120, 7]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    plain = make_tiny_model(tmp_path / "plain")
    return make_awq_checkpoint(plain, tmp_path / "awq", 32)[0]


def logits(folder: Path) -> np.ndarray:
    runtime = ModelRuntime(read_folder(folder), "cpu", max_total_tokens=64)
    runtime.add_sequence(0)
    return runtime.score(0, IDS)


def test_a_build_and_its_parts(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = BuildRequest(target="cpu:native", activations="int8", context_window_size=256)
    result = build(checkpoint, out, request)
    assert result.activations == result.as_json()["activations"] == "int8"
    assert result.verification is not None
    assert result.verification.limit == LIMITS["int8"]
    assert describe(out).facts["activations"] == "int8"
    rounded = logits(out)
    # The step compile, and gen-config again, keep what the folder says.
    again, unrounded = (Path(shutil.copytree(out, tmp_path / name)) for name in ("again", "exact"))
    generate_config(checkpoint, again, BuildRequest(context_window_size=256))
    assert read_chat_config(again).activations == "int8"
    compile_folder(again, None, "cpu:native")
    np.testing.assert_array_equal(logits(again), rounded)
    for damaged in ("int4", ["int8"], None):
        content = json.loads((again / "mlc-chat-config.json").read_text())
        content["activations"] = damaged
        (again / "mlc-chat-config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"activations .* are not known"):
            read_chat_config(again)
        with pytest.raises(UserError, match=r"activations .* are not known"):
            generate_config(checkpoint, again, BuildRequest())
    # Without the rounding the logits are others, and not by much.
    config = json.loads((unrounded / "mlc-chat-config.json").read_text())
    del config["activations"]
    (unrounded / "mlc-chat-config.json").write_text(json.dumps(config))
    compile_folder(unrounded, None, "cpu:native")
    exact = logits(unrounded)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < LIMITS["int8"]


def test_where_there_is_no_such_thing(checkpoint: Path, tmp_path: Path) -> None:
    for wrong in (
        BuildRequest(activations="int8", weight_layout=AUTOAWQ),
        BuildRequest(activations="int8", quantization="q4f32_autoawq_g32"),
        BuildRequest(activations="int8", target="vulkan:portable", verify=False),
        BuildRequest(activations="int4"),
    ):
        with pytest.raises(UserError, match="activations") as caught:
            build(checkpoint, tmp_path / "out", wrong)
        assert "--activations" in str(caught.value)
    with pytest.raises(UserError, match="and these are autoawq") as caught:
        generate_config(checkpoint, tmp_path / "step", BuildRequest(activations="int8"))
    assert f"--weight-layout {BLOCKED}" in str(caught.value)
    assert not (tmp_path / "step").exists()
    check_activations("int16", None)
    for target, layout in (("llvm", AUTOAWQ), ("cuda", AUTOAWQ)):
        with pytest.raises(ValueError, match=BLOCKED):
            dispatch.w4a16_linear(Target(target), 128, 64, 32, layout=layout, act_bits=8)
