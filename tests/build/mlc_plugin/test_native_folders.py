"""Folders that mlc_llm makes beside those that we make: the same keys, values and bytes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from awq_checkpoints import make_awq_checkpoint
from mlc_steps import ENTRY, read_parameters, run_step
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from mlcawq.build.convert_weight import convert_weight
from mlcawq.build.gen_config import gen_config
from mlcawq.checkpoint.config import load_json
from mlcawq.checkpoint.tensors import INDEX

pytestmark = pytest.mark.mlc_llm
SIZES = {"hidden": 256, "intermediate": 512}


def awq(folder: Path, family: str, group_size: int = 128, **changes: Any) -> Path:
    made = {name: changes.pop(name) for name in ("tie", "rope", "bias") if name in changes}
    plain = make_tiny_model(folder / family, family, **SIZES, **made)
    return make_awq_checkpoint(plain, folder / f"{family}-awq", group_size, **changes)[0]


def split(checkpoint: Path, files: int) -> Path:
    """The checkpoint's tensors spread over several files, in turns."""
    state = load_file(checkpoint / "model.safetensors")
    where = {name: f"part-{i % files}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(where.values()):
        content = {name: tensor for name, tensor in state.items() if where[name] == file}
        save_file(content, checkpoint / file)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": where}))
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


def assert_same_parameters(theirs: Path, ours: Path) -> None:
    assert sorted(p.name for p in theirs.glob("*.bin")) == sorted(
        p.name for p in ours.glob("*.bin")
    )
    for shard in ours.glob("params_shard_*.bin"):
        assert (theirs / shard.name).read_bytes() == shard.read_bytes(), shard.name
    got, expected = read_parameters(theirs), read_parameters(ours)
    assert list(got) == list(expected)
    for name, stored in expected.items():
        assert got[name].place == stored.place, name
        assert got[name].array.shape == stored.array.shape, name
        assert got[name].array.dtype == stored.array.dtype, name


def test_stock_llama_has_our_bytes(mlc_python: Path, tmp_path: Path) -> None:
    checkpoint = awq(tmp_path, "llama")
    words = ["--quantization", "q4f16_autoawq", "--device", "cpu"]
    weights = ["--source-format", "awq", "--source", checkpoint / "model.safetensors"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    run_step(mlc_python, "--stock", "convert_weight", checkpoint, *words, *weights, "-o", theirs)
    convert_weight(checkpoint, ours)
    assert_same_parameters(theirs, ours)


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    # name: family, group size, how the checkpoint is made, what is asked for
    "llama": ("llama", 128, {"rope": "llama3"}, {}),
    "llama tiled": ("llama", 64, {}, {"weight_layout": "n16k64"}),
    "llama symmetric": ("llama", 64, {"zero_point": False, "with_zeros": False}, {}),
    "llama partly": ("llama", 32, {"skip": ["o_proj", "layers.1.mlp"]}, {}),
    "mistral": ("mistral", 128, {}, {"quantization": "q4f32_autoawq"}),
    "qwen2": ("qwen2", 64, {"tie": True}, {}),
    "qwen2 tiled": ("qwen2", 32, {}, {"weight_layout": "n16k64"}),
    "qwen3": ("qwen3", 32, {}, {}),
}


@pytest.mark.parametrize(
    ("case", "files"), [*((case, 1) for case in CASES), ("llama symmetric", 2), ("qwen3", 3)]
)
def test_plug_in_makes_our_folder(mlc_python: Path, tmp_path: Path, case: str, files: int) -> None:
    family, group_size, made, asked = CASES[case]
    checkpoint = awq(tmp_path, family, group_size, **made)
    if files > 1:
        split(checkpoint, files)
    before = sorted(entry.name for entry in checkpoint.iterdir())
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    suffix = "" if group_size == 128 else f"_g{group_size}"
    name = asked.get("quantization", f"q4f16_autoawq{suffix}")
    layout = asked.get("weight_layout")
    words = [checkpoint, "--quantization", name, "-o", theirs]
    sizes = ["--max-batch-size", 4, *(["--weight-layout", layout] if layout else [])]
    run_step(mlc_python, "gen_config", *words, *sizes)
    run_step(mlc_python, "convert_weight", *words, "--device", "cpu")
    assert sorted(entry.name for entry in checkpoint.iterdir()) == before

    gen_config(checkpoint, ours, name, weight_layout=layout)
    convert_weight(checkpoint, ours, name)
    assert_same_parameters(theirs, ours)
    assert load_json(theirs / "mlc-chat-config.json") == load_json(ours / "mlc-chat-config.json")
    caches = [load_json(folder / "tensor-cache.json")["metadata"] for folder in (theirs, ours)]
    assert caches[0] == caches[1]
    files_of = [sorted(p.name for p in folder.iterdir()) for folder in (theirs, ours)]
    assert files_of[0] == files_of[1]


def test_conversion_needs_neither_torch_nor_transformers(mlc_python: Path, tmp_path: Path) -> None:
    checkpoint = awq(tmp_path, "llama")
    words = ["convert_weight", checkpoint, "--quantization", "q4f16_autoawq", "--device", "cpu"]
    code = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"
        f"sys.argv = {[str(word) for word in (ENTRY, *words, '-o', tmp_path / 'theirs')]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    subprocess.run([str(mlc_python), "-c", code], check=True, capture_output=True)
    (tmp_path / "ours").mkdir()
    convert_weight(checkpoint, tmp_path / "ours")
    assert_same_parameters(tmp_path / "theirs", tmp_path / "ours")


def test_template_and_sizes_of_the_user_are_kept(mlc_python: Path, tmp_path: Path) -> None:
    checkpoint = awq(tmp_path, "qwen2")
    template = load_json(Path(__file__).parents[3] / "templates" / "conversation" / "chatml.json")
    (tmp_path / "mine.json").write_text(json.dumps({**template, "name": "mine", "stop_str": ["!"]}))
    out = tmp_path / "out"
    words = ["--quantization", "q4f16_autoawq", "--conv-template", tmp_path / "mine.json"]
    sizes = ["--context-window-size", 512, "--prefill-chunk-size", 64, "--max-batch-size", 3]
    run_step(mlc_python, "gen_config", checkpoint, *words, *sizes, "-o", out)
    content = load_json(out / "mlc-chat-config.json")
    assert (content["conv_template"]["name"], content["conv_template"]["stop_str"]) == (
        "mine",
        ["!"],
    )
    for key, value in (
        ("context_window_size", 512),
        ("prefill_chunk_size", 64),
        ("max_batch_size", 3),
    ):
        assert content[key] == content["model_config"][key] == value


def test_unquantized_checkpoints_go_the_way_of_mlc_llm(mlc_python: Path, tmp_path: Path) -> None:
    checkpoint = make_tiny_model(tmp_path / "qwen3", "qwen3", **SIZES)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    words = [checkpoint, "--quantization", "q0f16", "-o", theirs]
    run_step(mlc_python, "gen_config", *words, "--max-batch-size", 4)
    run_step(mlc_python, "convert_weight", *words, "--device", "cpu")
    gen_config(checkpoint, ours)
    convert_weight(checkpoint, ours)
    assert_same_parameters(theirs, ours)
    assert load_json(theirs / "mlc-chat-config.json") == load_json(ours / "mlc-chat-config.json")
    assert not (checkpoint / INDEX).exists()
