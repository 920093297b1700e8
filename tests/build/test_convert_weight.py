"""tensor-cache.json and its shards: contents, format, streaming, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from awq_checkpoints import make_awq_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from mlcawq.build import convert_weight as module
from mlcawq.build.convert_weight import convert_weight
from mlcawq.errors import UserError
from tir_kernels.reference import dequantize, untile


def read_parameters(folder: Path) -> dict[str, np.ndarray]:
    """What MLC's loader makes of a folder, by the format alone."""
    cache = json.loads((folder / "tensor-cache.json").read_text())
    parameters = {}
    for shard in cache["records"]:
        data = (folder / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"]
        assert hashlib.md5(data).hexdigest() == shard["md5sum"]
        assert shard["format"] == "raw-shard"
        for record in shard["records"]:
            assert record["format"] == "raw"
            raw = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            array = np.frombuffer(raw, record["dtype"]).reshape(record["shape"])
            parameters[record["name"]] = array
    return parameters


def test_quantized(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain", "qwen2", tie=True)
    awq, reference = make_awq_checkpoint(plain, tmp_path / "awq", 64)
    result = convert_weight(awq, tmp_path / "out")
    parameters = read_parameters(tmp_path / "out")
    assert result.quantization == "q4f16_autoawq_g64"
    assert result.num_parameters == len(parameters)
    assert result.total_bytes == sum(array.nbytes for array in parameters.values())
    assert "lm_head.weight" not in parameters

    prefix = "model.layers.1.self_attn.c_attn"
    weight = dequantize(*(parameters[f"{prefix}.{k}"] for k in ("qweight", "qzeros", "scales")))
    parts = [reference[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    np.testing.assert_array_equal(weight.T, torch.cat(parts).numpy())
    biases = [reference[f"model.layers.1.self_attn.{p}_proj.bias"] for p in "qkv"]
    np.testing.assert_array_equal(parameters[f"{prefix}.bias"], torch.cat(biases).half().numpy())


@pytest.mark.parametrize("group_size", [32, 64])
def test_tiled_weights_hold_the_checkpoints_bytes(tmp_path: Path, group_size: int) -> None:
    # qkv has 5 * 40 outputs: its last tile is half full.
    plain = make_tiny_model(
        tmp_path / "plain", bias=True, hidden=192, heads=3, kv_heads=1, head_dim=40, mlp_bias=True
    )
    awq, reference = make_awq_checkpoint(plain, tmp_path / "awq", group_size, skip=("o_proj",))
    convert_weight(awq, tmp_path / "out", weight_layout="n16k64")
    parameters = read_parameters(tmp_path / "out")
    state = load_file(awq / "model.safetensors")
    kinds = ("qweight", "qzeros", "scales")
    for i in range(2):
        for fused, parts in {
            "self_attn.qkv_proj": [f"self_attn.{p}_proj" for p in "qkv"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }.items():
            name = f"model.layers.{i}.{fused}"
            originals = [
                torch.cat([state[f"model.layers.{i}.{part}.{kind}"] for part in parts], 1).numpy()
                for kind in kinds
            ]
            tiled = [parameters[f"{name}.{kind}"] for kind in kinds]
            K, N = originals[0].shape[0], originals[2].shape[1]
            for got, original in zip(
                untile(*tiled, K, N, silu="gate_up" in fused), originals, strict=True
            ):
                assert got.tobytes() == original.tobytes(), name
        biases = [reference[f"model.layers.{i}.mlp.{p}_proj.bias"] for p in ("gate", "up")]
        natural = torch.cat(biases).half().numpy()
        np.testing.assert_array_equal(
            parameters[f"model.layers.{i}.mlp.gate_up_proj.bias"], natural
        )
    assert "model.layers.0.self_attn.o_proj.weight" in parameters


def test_padding_has_no_value_where_zeros_are_constant(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain", hidden=64, heads=1, kv_heads=1, head_dim=40)
    awq, _ = make_awq_checkpoint(
        plain, tmp_path / "awq", 32, zero_point=False, with_zeros=False, skip=("o_proj",)
    )
    # Not a whole number of tiles: 3 * 40 outputs.
    convert_weight(awq, tmp_path / "out", weight_layout="n16k64")
    zeros = read_parameters(tmp_path / "out")["model.layers.0.self_attn.qkv_proj.qzeros"]
    assert (zeros[:-1].view(np.uint32) == 0x88888888).all()
    assert (zeros[-1].view(np.uint32) == 0x08080808).all()


def test_float32_beside_quantized_weights(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain", dtype="bfloat16")
    awq, _ = make_awq_checkpoint(plain, tmp_path / "awq", 32)
    for layout in ("autoawq", "n16k64"):
        out = tmp_path / layout
        result = convert_weight(awq, out, "q4f32_autoawq_g32", weight_layout=layout)
        parameters = read_parameters(out)
        assert result.quantization == "q4f32_autoawq_g32"
        assert {str(array.dtype) for array in parameters.values()} == {"uint32", "float32"}
    half = tmp_path / "half"
    convert_weight(awq, half)
    name = "model.layers.0.mlp.down_proj.scales"
    np.testing.assert_array_equal(
        read_parameters(tmp_path / "autoawq")[name], read_parameters(half)[name]
    )


def test_the_layout_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    awq, _ = make_awq_checkpoint(plain, tmp_path / "awq", 64)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mlc-chat-config.json").write_text(json.dumps({"weight_layout": "n16k64"}))
    convert_weight(awq, out)
    assert read_parameters(out)["model.layers.0.mlp.down_proj.qweight"].ndim == 3
    with pytest.raises(UserError, match=r"autoawq.*says n16k64"):
        convert_weight(awq, out, weight_layout="autoawq")
    with pytest.raises(UserError, match="n16k64"):
        convert_weight(awq, tmp_path / "other", weight_layout="n8k8")


def test_unquantized_is_fused_along_rows_and_cast(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3", dtype="bfloat16")
    state = load_file(folder / "model.safetensors")
    convert_weight(folder, tmp_path / "half")
    convert_weight(folder, tmp_path / "full", "q0f32")
    for name, dtype in (("half", np.float16), ("full", np.float32)):
        parameters = read_parameters(tmp_path / name)
        parts = [state[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        want = torch.cat(parts).float().numpy().astype(dtype)
        np.testing.assert_array_equal(parameters["model.layers.0.mlp.gate_up_proj.weight"], want)
        assert {array.dtype for array in parameters.values()} == {np.dtype(dtype)}
        assert parameters["model.layers.0.self_attn.q_norm.weight"].shape == (32,)


def test_symmetric_checkpoint_without_zeros(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    awq, _ = make_awq_checkpoint(plain, tmp_path / "awq", 32, zero_point=False, with_zeros=False)
    convert_weight(awq, tmp_path / "out")
    zeros = read_parameters(tmp_path / "out")["model.layers.0.mlp.down_proj.qzeros"]
    assert (zeros.view(np.uint32) == 0x88888888).all()


def test_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    folder = make_tiny_model(tmp_path / "model")
    seen: list[tuple[str, int, int]] = []
    convert_weight(folder, tmp_path / "out", progress=lambda *step: seen.append(step))
    cache = json.loads((tmp_path / "out" / "tensor-cache.json").read_text())
    assert len(cache["records"]) > 3
    for shard in cache["records"]:
        assert shard["nbytes"] <= 100_000 or len(shard["records"]) == 1
    assert seen[-1][1] == seen[-1][2] == cache["metadata"]["ParamBytes"]
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    read_parameters(tmp_path / "out")


def test_shards_are_those_of_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlc_llm stores parameters with TVM's own function: same order in, same files out."""
    tvmjs = pytest.importorskip("tvm.contrib.tvmjs")
    monkeypatch.setattr(module, "SHARD_BYTES", 2**20)
    plain = make_tiny_model(tmp_path / "plain", hidden=384, intermediate=1408)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    order: list[str] = []
    convert_weight(plain, ours, progress=lambda name, *_: order.append(name))
    stored = read_parameters(ours)
    arrays = {name: stored[name] for name in order}
    tvmjs.dump_tensor_cache(arrays, str(theirs), "raw", shard_cap_mb=1, show_progress=False)
    files = sorted(file.name for file in ours.glob("*.bin"))
    assert len(files) > 5
    assert files == sorted(file.name for file in theirs.glob("*.bin"))
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    caches = [json.loads((folder / "tensor-cache.json").read_text()) for folder in (ours, theirs)]
    assert caches[0]["records"] == caches[1]["records"]


def test_every_parameter_begins_where_kernels_may_read_it(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", hidden=48, intermediate=80)
    convert_weight(folder, tmp_path / "out")
    cache = json.loads((tmp_path / "out" / "tensor-cache.json").read_text())
    records = [record for shard in cache["records"] for record in shard["records"]]
    assert any(record["nbytes"] % 64 for record in records)
    assert all(record["byteOffset"] % 64 == 0 for record in records)
    assert cache["metadata"]["ParamBytes"] == sum(record["nbytes"] for record in records)
    stored = read_parameters(tmp_path / "out")
    source = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(stored["model.norm.weight"], source["model.norm.weight"].numpy())


def test_other_files_stay_and_old_shards_go(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mlc-chat-config.json").write_text("{}")
    (out / "params_shard_99.bin").write_bytes(b"old")
    convert_weight(folder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "mlc-chat-config.json",
        "params_shard_0.bin",
        "tensor-cache.json",
    ]


def broken(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    folder = make_tiny_model(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")
    return folder


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path) -> None:
    folder = broken(
        tmp_path,
        {
            "model.norm.weight": None,
            "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3),
            "model.layers.1.self_attn.o_proj.weight": torch.zeros(128, 128, dtype=torch.int32),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(128),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
        },
    )
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        convert_weight(folder, out)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for name in ("model.norm.weight", "up_proj.weight", "o_proj.weight", "q_proj.bias"):
        assert name in text
    assert not out.exists()


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    words = torch.zeros(128, 50, dtype=torch.int32)
    folder = broken(tmp_path, {"lm_head.weight": None, "lm_head.qweight": words})
    with pytest.raises(UserError, match="--quantize-head") as caught:
        convert_weight(folder, tmp_path / "out")
    assert len(caught.value.problems) == 1


def test_overflow_names_the_tensors_and_leaves_nothing(tmp_path: Path) -> None:
    large = torch.ones(128)
    large[5] = 70000
    folder = broken(
        tmp_path,
        {"model.norm.weight": large, "model.layers.0.input_layernorm.weight": large.bfloat16()},
    )
    out = tmp_path / "out"
    with pytest.raises(UserError, match="q0f32") as caught:
        convert_weight(folder, out)
    assert len(caught.value.problems) == 2
    assert list(out.iterdir()) == []
    assert convert_weight(folder, out, "q0f32").quantization == "q0f32"
    stored = read_parameters(out)["model.norm.weight"][5]
    assert stored == np.float32(70000)
    assert (
        float(ml_dtypes.bfloat16(70000))
        == read_parameters(out)["model.layers.0.input_layernorm.weight"][5]
    )


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(module, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="free"):
        convert_weight(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_result_survives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    convert_weight(folder, out)
    before = read_parameters(out)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_file", fail)
    with pytest.raises(UserError, match="disk is full"):
        convert_weight(folder, out)
    assert read_parameters(out).keys() == before.keys()
    assert not list(out.glob(".params*"))
