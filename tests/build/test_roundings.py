"""Whole builds that round activations, or keys and values, to 8 bits: they do, and say so."""

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
from mlcawq.engine.devices import Device
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.errors import UserError
from mlcawq.graph.roundings import EXACT, check_roundings
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


def runtime_of(folder: Path) -> ModelRuntime:
    return ModelRuntime(read_folder(folder), "cpu", max_total_tokens=256)


def logits(folder: Path) -> np.ndarray:
    runtime = runtime_of(folder)
    runtime.add_sequence(0)
    return runtime.score(0, IDS)


def test_a_build_and_its_parts(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = BuildRequest(target="cpu:native", activations="int8", context_window_size=256)
    result = build(checkpoint, out, request)
    assert result.roundings.activations == result.as_json()["activations"] == "int8"
    assert result.verification is not None
    assert result.verification.limit == LIMITS["int8"]
    assert describe(out).facts["activations"] == "int8"
    rounded = logits(out)
    # The step compile, and gen-config again, keep what the folder says.
    again, unrounded = (Path(shutil.copytree(out, tmp_path / name)) for name in ("again", "exact"))
    generate_config(checkpoint, again, BuildRequest(context_window_size=256))
    assert read_chat_config(again).roundings.activations == "int8"
    compile_folder(again, None, "cpu:native")
    np.testing.assert_array_equal(logits(again), rounded)
    for damaged in ("int4", ["int8"], None):
        content = json.loads((again / "mlc-chat-config.json").read_text())
        content["activations"] = damaged
        (again / "mlc-chat-config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"activations = .* is not known"):
            read_chat_config(again)
        with pytest.raises(UserError, match=r"activations = .* is not known"):
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
    check_roundings(EXACT, None, None)
    for target, layout in (("llvm", AUTOAWQ), ("cuda", AUTOAWQ)):
        with pytest.raises(ValueError, match=BLOCKED):
            dispatch.w4a16_linear(Target(target), 128, 64, 32, layout=layout, act_bits=8)


def test_a_cache_in_8_bits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    request = BuildRequest(target="cpu:native", kv_cache_dtype="int8", context_window_size=256)
    result = build(checkpoint, out, request)
    assert result.as_json()["kv_cache_dtype"] == "int8"
    assert result.as_json()["activations"] == "int16"
    assert describe(out).facts["kv_cache_dtype"] == "int8"
    rounded = logits(out)
    exact = Path(shutil.copytree(out, tmp_path / "exact"))
    generate_config(checkpoint, exact, BuildRequest(context_window_size=256, kv_cache_dtype="auto"))
    assert read_chat_config(exact).roundings == EXACT
    compile_folder(exact, None, "cpu:native")
    error = np.linalg.norm(rounded - logits(exact)) / np.linalg.norm(rounded)
    assert 1e-4 < error < LIMITS["int8"]
    head_dim = read_folder(out).config["model_config"]["head_dim"]
    recorded = [runtime_of(f).metadata["kv_cache"].get("slot_bytes") for f in (out, exact)]
    assert recorded == [head_dim + 4, None]
    # As many more tokens have room in the same memory.
    cache = runtime_of(exact).metadata["kv_cache"]
    token = 4 * cache["num_hidden_layers"] * cache["num_key_value_heads"] * head_dim
    monkeypatch.setattr(Device, "free_memory", lambda *_: 700 * token)
    room = [
        ModelRuntime(read_folder(folder), "cpu", weights="resident").capacity
        for folder in (out, exact)
    ]
    assert room[0] / room[1] == pytest.approx(2 * head_dim / (head_dim + 4), rel=0.1)


def test_pages_in_8_bits_are_shared_and_cut(checkpoint: Path, tmp_path: Path) -> None:
    """What is forked, cut or decoded beside others is what a sequence of its own would be."""
    out = tmp_path / "out"
    request = BuildRequest(target="cpu:native", kv_cache_dtype="int8", context_window_size=256)
    build(checkpoint, out, request)
    runtime = runtime_of(out)
    ids = [(7 * i) % 400 for i in range(40)]
    for sequence, kept in ((0, 40), (1, 21), (2, 16)):
        runtime.add_sequence(sequence)
        runtime.prefill([(sequence, ids[:kept])])
    alone = [runtime.decode([sequence], [3])[0] for sequence in (1, 2)]
    runtime.fork_sequence(0, 3, 21)  # in the middle of a page
    runtime.pop(0, 24)
    together = runtime.decode([3, 0], [3, 3])
    for found, want in zip(together, alone, strict=True):
        assert np.linalg.norm(found - want) < 2e-3 * np.linalg.norm(want)
    runtime.clear()
    runtime.add_sequence(0)
    runtime.prefill([(0, ids[:9])])
    runtime.prefill([(0, ids[9:21])])  # attends to pages and to its own keys
    (found,) = runtime.decode([0], [3])
    assert np.linalg.norm(found - alone[0]) < 2e-3 * np.linalg.norm(alone[0])


def test_caches_that_there_are_not(checkpoint: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (BuildRequest(kv_cache_dtype="int8", target="vulkan:portable", verify=False), "on CPUs"),
        (BuildRequest(kv_cache_dtype="int4"), "not known"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            build(checkpoint, tmp_path / "out", wrong)
        assert "--kv-cache-dtype" in str(caught.value)
    both = BuildRequest(kv_cache_dtype="int4", activations="int4")
    with pytest.raises(UserError) as caught:
        build(checkpoint, tmp_path / "out", both)
    assert {"--activations", "--kv-cache-dtype"} <= {p.where for p in caught.value.problems}
