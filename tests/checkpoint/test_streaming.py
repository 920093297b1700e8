"""Block by block gives what transformers gives for the whole model."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awq_checkpoints import make_awq_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import ROPES, make_tiny_model
from transformers import AutoModelForCausalLM

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from tir_kernels.reference import dequantize, pack

VOCABULARY = 259  # ids below this exist in every tiny tokenizer


def _ids(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for shape in shapes]


def _reference(folder: Path, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(ids).logits for ids in batches]


def _agree(folder: Path, batches: list[torch.Tensor]) -> None:
    for found, expected in zip(
        StreamedModel(folder).logits(batches), _reference(folder, batches), strict=True
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie": True}),
        ("llama", {"bias": True, "mlp_bias": True, "dtype": "bfloat16"}),
        ("mistral", {"sliding_window": 8, "dtype": "float32"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", {"tie": True, "kv_heads": 4}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_families(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path, family, **options)
    _agree(folder, _ids((2, 33), (1, 7), (1, 1)))


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize("rope", sorted(set(ROPES) - {"default"}))
def test_rope_types_in_both_config_forms(tmp_path: Path, rope: str, form: int) -> None:
    # 300 tokens reach beyond the original context of every type; 20 stay within it.
    folder = make_tiny_model(tmp_path, rope=rope, context=512, config_form=form, hidden=64)
    _agree(folder, _ids((1, 20), (1, 300)))


def test_dynamic_rope_forgets_a_longer_batch(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, rope="dynamic", context=64, hidden=64)
    long, short = _ids((1, 100), (1, 20))
    alone = StreamedModel(folder).logits([short])[0]
    after = StreamedModel(folder).logits([long, short])[1]
    assert torch.equal(alone, after)


def test_awq_folder_is_dequantized(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "awq", "qwen2", hidden=128)
    plain = tmp_path / "plain"
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj.weight" not in name:
            stored[name] = tensor
            continue
        n, k = tensor.shape
        qweight = pack(rng.integers(0, 16, (k, n), dtype=np.uint8))
        qzeros = pack(rng.integers(6, 10, (k // 32, n), dtype=np.uint8))
        scales = rng.uniform(0.01, 0.02, (k // 32, n)).astype(np.float16)
        prefix = name.removesuffix("weight")
        stored[f"{prefix}qweight"] = torch.from_numpy(qweight)
        stored[f"{prefix}qzeros"] = torch.from_numpy(qzeros)
        stored[f"{prefix}scales"] = torch.from_numpy(scales)
        tensors[name] = torch.from_numpy(
            dequantize(qweight, qzeros, scales, np.float32)
        ).T.contiguous()
    make_tiny_model(plain, "qwen2", hidden=128)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    (folder / "config.json").write_text(json.dumps(config))

    batches = _ids((2, 12))
    found = StreamedModel(folder).logits(batches)[0]
    torch.testing.assert_close(found, _reference(plain, batches)[0], rtol=1e-4, atol=1e-4)


def test_zeros_that_a_symmetric_folder_leaves_out(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain", layers=1)
    kinds = {"zero_point": False, "with_zeros": False}
    without, reference = make_awq_checkpoint(plain, tmp_path / "without", 32, **kinds)
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(StreamedModel(without).tensor(name), reference[name])
    # A folder that promises zeros has to have them.
    config = json.loads((without / "config.json").read_text())
    config["quantization_config"]["zero_point"] = True
    (without / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"down_proj\.qzeros: tensor is missing"):
        StreamedModel(without)


def test_head_is_the_same_in_slices(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = StreamedModel(tiny_llama), _ids((1, 9))
    whole = model.logits(batches)[0]
    monkeypatch.setattr("mlcawq.checkpoint.streaming._HEAD_BYTES", 128 * 4 * 7)  # 7 rows
    torch.testing.assert_close(model.logits(batches)[0], whole, rtol=1e-5, atol=1e-5)


def test_one_block_in_memory(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_model(tmp_path, layers=6, hidden=64))
    model.layer_arguments(0, 1, 4)
    weights = 64 * 256  # elements of a block's largest weight

    def held() -> int:
        gc.collect()
        return sum(
            isinstance(x, torch.nn.Parameter) and not x.is_meta and x.numel() >= weights
            for x in gc.get_objects()
            if type(x) is torch.nn.Parameter
        )

    before = held()
    block = model.block(3)
    assert held() - before == 3  # gate, up, down
    del block
    assert held() == before


def test_all_bad_tensors_are_named_together(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 128)
    tensors["model.layers.0.adapter.weight"] = torch.zeros(2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        StreamedModel(folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "model.layers.1.mlp.up_proj.weight: tensor is missing" in text
    assert "[3, 128] where config.json means [64, 128]" in text
    assert "model.layers.0.adapter.weight" in text
