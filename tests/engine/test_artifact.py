"""Folders that are incomplete, damaged or mixed up: one clear error, and never an answer."""

import json
import shutil

import numpy as np
import pytest

from mlcawq.engine.artifact import TensorRecord, check_library, read_folder
from mlcawq.engine.engine import Engine
from mlcawq.engine.weights import as_array
from mlcawq.errors import UserError

METADATA_KEYS = ("model_type", "quantization", "context_window_size", "params", "kv_cache")


@pytest.fixture(scope="module")
def metadata(built):
    return dict(Engine(built).metadata)


def edit(path, **changes):
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def first_shard(folder):
    return sorted(folder.glob("params_shard_*.bin"))[0]


def refused(folder, *parts, problems=1, **options):
    with pytest.raises(UserError) as error:
        Engine(folder, **options)
    text = str(error.value)
    for part in parts:
        assert part in text
    assert len(error.value.problems) == problems
    return error.value


def test_a_hugging_face_folder_is_told_to_be_built(checkpoint):
    refused(checkpoint, "Hugging Face checkpoint", "mlcawq build")


def test_no_folder_a_file_and_an_empty_folder(tmp_path):
    refused(tmp_path / "no", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "mlc-chat-config.json is missing")


def test_everything_missing_is_named_at_once(own_built):
    for name in ("tokenizer.json", "tensor-cache.json", "lib-cpu.so"):
        (own_built / name).unlink()
    error = refused(
        own_built, "tokenizer.json", "weights are missing", "lib-<target>.so", problems=3
    )
    assert all(problem.fix for problem in error.problems)
    for command in ("gen-config", "convert-weight", "compile"):
        assert command in str(error)


def test_a_truncated_and_a_missing_shard(own_built):
    shard = first_shard(own_built)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(own_built, shard.name, "bytes long instead of")
    shard.unlink()
    refused(own_built, shard.name, "missing")


def test_one_changed_byte_of_the_weights(own_built):
    shard = first_shard(own_built)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(own_built, shard.name, "md5")


def test_files_that_are_no_json(own_built):
    for name in ("mlc-chat-config.json", "tensor-cache.json"):
        (own_built / name).write_text("{")
    refused(own_built, "mlc-chat-config.json", "tensor-cache.json", problems=2)
    (own_built / "tensor-cache.json").write_text('{"records": [{}]}')
    (own_built / "mlc-chat-config.json").write_text("[]")
    refused(own_built, "not a JSON object", "not an index of tensors", problems=2)


def test_a_library_that_is_none(own_built):
    (own_built / "lib-cpu.so").write_bytes(b"\x7fELF nonsense")
    refused(own_built, "lib-cpu.so", "cannot be loaded")


def test_a_library_that_was_copied_half(own_built):
    library = own_built / "lib-cpu.so"
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    refused(own_built, "cut short", str(library))


def test_an_index_that_contradicts_itself(own_built):
    index = own_built / "tensor-cache.json"
    data = json.loads(index.read_text())
    records = data["records"][0]["records"]
    records[0]["nbytes"] -= 2
    records[1]["dtype"] = "complex128"
    index.write_text(json.dumps(data))
    edit(own_built / "mlc-chat-config.json", model_config=[])
    names = (records[0]["name"], records[1]["name"])
    refused(own_built, *names, "model_config is no object", problems=3)


def test_devices(own_built):
    refused(own_built, "unknown device 'tpu'", device="tpu")
    refused(own_built, "no library for cuda", "--target cuda", device="cuda")
    (own_built / "lib-cpu.so").rename(own_built / "lib-metal.so")
    refused(
        own_built, "metal cannot be used on this machine", "no library that runs here", problems=2
    )
    refused(own_built, "metal:1 cannot be used on this machine", device="metal:1")
    (own_built / "lib-metal.so").rename(own_built / "lib-x.so")
    refused(own_built, "no compiled library")


def test_a_library_outside_of_the_folder(own_built, tmp_path):
    outside = shutil.move(own_built / "lib-cpu.so", tmp_path / "model-cpu.so")
    assert Engine(own_built, library=outside).device == "cpu:0"
    refused(own_built, "does not exist", library=tmp_path / "no-cpu.so")
    refused(own_built, "the library is a folder", library=tmp_path)
    odd = shutil.move(outside, tmp_path / "model.so")
    refused(own_built, "does not say its device", library=odd)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"quantization": "q4f16_autoawq"}, ("quantization", "q0f32", "q4f16_autoawq")),
        ({"model_type": "qwen2"}, ("model_type",)),
        ({"weight_layout": "packed_v9"}, ("weight_layout", "packed_v9")),
        ({"context_window_size": 512}, ("context_window_size",)),
    ],
)
def test_a_library_for_another_config(own_built, changes, parts):
    edit(own_built / "mlc-chat-config.json", **changes)
    refused(own_built, "lib-cpu.so", *parts)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"num_attention_heads": 8, "head_dim": 16}, ["head_dim", "num_attention_heads"]),
        ({"rope_theta": 5000, "rope_parameters": None}, ["rope"]),
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps"]),
    ],
)
def test_an_architecture_edited_after_compiling(own_built, changes, keys):
    config = json.loads((own_built / "mlc-chat-config.json").read_text())
    model = {k: v for k, v in {**config["model_config"], **changes}.items() if v is not None}
    edit(own_built / "mlc-chat-config.json", model_config=model)
    refused(own_built, *(f"compiled for {key} =" for key in keys), problems=len(keys))


def test_without_a_record_of_the_architecture_the_cache_s_shape_is_compared(built, metadata):
    folder = read_folder(built)
    stock = {k: v for k, v in metadata.items() if k != "architecture"}
    check_library(folder, stock, built / "lib-cpu.so")
    stock["kv_cache"] = {**stock["kv_cache"], "num_key_value_heads": 4}
    with pytest.raises(UserError, match="compiled for num_key_value_heads = 4"):
        check_library(folder, stock, built / "lib-cpu.so")


def test_a_smaller_context_than_compiled_for_is_fine(own_built):
    edit(own_built / "mlc-chat-config.json", context_window_size=128)
    assert Engine(own_built).context_window_size == 128


def test_weights_of_another_model(own_built):
    cache = json.loads((own_built / "tensor-cache.json").read_text())
    records = cache["records"][0]["records"]
    records[0]["shape"] = [1, *records[0]["shape"]]
    records[1]["name"] += ".other"
    (own_built / "tensor-cache.json").write_text(json.dumps(cache))
    refused(own_built, "does not fit the weights", records[0]["name"], "not among the weights")


def test_metadata_of_what_cannot_be_run(built, metadata):
    folder = read_folder(built)
    library = built / "lib-cpu.so"
    check_library(folder, metadata, library)
    for changes, part in (
        ({"sliding_window_size": 64}, "rolling cache of 64"),
        ({"tensor_parallel_shards": 2}, "tensor_parallel_shards"),
        ({"kv_state_kind": "rnn_state"}, "rnn_state"),
        ({"model_task": "embedding"}, "not one for text generation"),
        ({"params": []}, "names no parameters"),
    ):
        with pytest.raises(UserError, match=part):
            check_library(folder, {**metadata, **changes}, library)


def test_what_mlc_llm_writes_is_read(own_built, metadata):
    """No weight_layout and no model_config in the metadata, symbolic sizes, the old index name."""
    edit(own_built / "mlc-chat-config.json", weight_layout=None)
    (own_built / "tensor-cache.json").rename(own_built / "ndarray-cache.json")
    theirs = {key: metadata[key] for key in METADATA_KEYS}
    theirs["params"] = [
        {**p, "shape": ["vocab_size" if s == 400 else s for s in p["shape"]]}
        for p in metadata["params"]
    ]
    check_library(read_folder(own_built), theirs, own_built / "lib-cpu.so")


def test_a_tokenizer_larger_than_the_model(own_built):
    edit(own_built / "mlc-chat-config.json", vocab_size=300)
    refused(own_built, "tokenizer has ids up to 399", "end at 299")


def test_the_template_is_checked(own_built):
    edit(own_built / "mlc-chat-config.json", conv_template="chatml")
    refused(own_built, "only the name of a template")


def test_without_a_template_the_model_is_plain(own_built):
    edit(own_built / "mlc-chat-config.json", conv_template=None)
    assert Engine(own_built).conversation.is_plain


def test_stored_types():
    values = np.array([[1.5, -2.0], [3.25, 1e30]], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    record = TensorRecord("x", (2, 2), "float32", "f32-to-bf16", 8, 0)
    np.testing.assert_allclose(
        as_array(halves.reshape(-1).view(np.uint8), record), values, rtol=1e-2
    )
    record = TensorRecord("x", (2, 2), "bfloat16", "raw", 8, 0)
    assert str(as_array(halves.reshape(-1).view(np.uint8), record).dtype) == "bfloat16"
    record = TensorRecord("x", (4,), "int32", "raw", 16, 0)
    ints = np.arange(4, dtype=np.int32)
    np.testing.assert_array_equal(as_array(ints.view(np.uint8), record), ints)
