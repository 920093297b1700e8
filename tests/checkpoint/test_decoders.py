"""Every decoder run block by block gives what transformers gives for the whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from awq_mixtures import make_awq_mixture
from safetensors.torch import load_file, save_file
from tiny_decoders import TINY_DECODERS, load_decoder, make_tiny_decoder

from mlcawq.checkpoint.experts import Experts
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError

VOCABULARY = 259  # ids below this exist in every tiny tokenizer
SHAPES = ((2, 33), (1, 7), (1, 1), (3, 20))

# Settings under which an architecture computes otherwise than under those of TINY_DECODERS.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon alibi": ("falcon", {"alibi": True}),
    "falcon 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon rw": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "opt 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "cohere qk norm": ("cohere", {"use_qk_norm": True}),
    "bloom": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v2 lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "phi3 longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "short_factor": [1.1] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma2 untied": ("gemma2", {"tie_word_embeddings": False}),
    "qwen2_vl tied": ("qwen2_vl", {"tie_word_embeddings": True}),
    "qwen3_moe float32": ("qwen3_moe", {"dtype": "float32"}),
    "deepseek_v3 bfloat16": ("deepseek_v3", {"dtype": "bfloat16"}),
}


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for shape in SHAPES]


def _agrees(folder: Path) -> StreamedModel:
    """The streamed model, after its logits were found to be those of the whole one."""
    whole, batches = load_decoder(folder), _batches()
    streamed = StreamedModel(folder)
    with torch.no_grad():
        for ids, found in zip(batches, streamed.iter_logits(batches), strict=True):
            expected = whole(ids).logits
            assert found.dtype == torch.float32
            assert expected.std() > 0.1  # a model that says something
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return streamed


@pytest.mark.parametrize("model_type", TINY_DECODERS)
def test_every_decoder(tmp_path: Path, model_type: str) -> None:
    folder = make_tiny_decoder(tmp_path, model_type)
    streamed = _agrees(folder)
    # Blocks own their tensors by the names in the file, and all of them.
    stored = load_file(folder / "model.safetensors")
    owned = [name for i in range(streamed.num_blocks) for name in streamed.block_tensors(i)]
    assert len(owned) == len(set(owned))
    assert set(owned) <= set(stored)
    for i in range(streamed.num_blocks):
        block = streamed.block(i)
        names = [streamed.checkpoint_name(i, name) for name in block.state_dict()]
        assert sorted(names) == streamed.block_tensors(i)
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, stored[streamed.checkpoint_name(i, name)].to(tensor.dtype))


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS.values(), ids=list(VARIANTS))
def test_settings_that_change_the_computation(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    _agrees(make_tiny_decoder(tmp_path, model_type, **changes))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        # One fused tensor for all experts in the file.
        ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        # The same, in another order of axes, gate and up interleaved, with biases and a clamp.
        (
            "gpt_oss",
            {
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
            },
        ),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("glm4", {"head_dim": 16}),
        ("arcee", {}),
        ("roberta", {"is_decoder": True, "type_vocab_size": 1}),
    ],
)
def test_decoders_that_no_table_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, changes: dict[str, Any]
) -> None:
    settings = {**TINY_DECODERS["llama"], **changes}
    monkeypatch.setitem(TINY_DECODERS, model_type, settings)
    streamed = _agrees(make_tiny_decoder(tmp_path, model_type))
    experts = [name for name in streamed.outline.linear_shapes(1) if ".experts.3." in name]
    assert len(experts) == (3 if "num_experts_per_tok" in changes else 0)


def test_experts_that_a_checkpoint_keeps_in_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY_DECODERS["llama"], "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(TINY_DECODERS, "granitemoe", settings)
    outline = StreamedModel(make_tiny_decoder(tmp_path / "a", "granitemoe")).outline
    merged = outline.merged(1)
    assert len(merged) == 12
    assert merged["block_sparse_moe.experts.2.down_proj"] == [
        "model.layers.1.block_sparse_moe.output_linear.weight"
    ]
    stored = load_file(tmp_path / "a" / "model.safetensors")
    (gate_up,) = merged["block_sparse_moe.experts.2.up_proj"]
    block = StreamedModel(tmp_path / "a").block(1)
    up = block.get_submodule("block_sparse_moe.experts.2.up_proj").weight
    assert torch.equal(up, stored[gate_up][2, -len(up) :].float())
    assert StreamedModel(make_tiny_decoder(tmp_path / "b", "mixtral")).outline.merged(1) == {}


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3", "gpt_oss"])
def test_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    settings = {**TINY_DECODERS["mixtral"], "head_dim": 16}
    monkeypatch.setitem(TINY_DECODERS, "gpt_oss", settings)
    folder = make_tiny_decoder(tmp_path, model_type)
    ids = _batches()[0]
    with torch.no_grad():
        found = StreamedModel(folder).whole()(ids).logits
        torch.testing.assert_close(found, load_decoder(folder)(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "experts", "name"),
    [
        ("mixtral", "mlp.experts", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
        ("qwen2_moe", "mlp.experts", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("deepseek_v3", "mlp.experts", "model.layers.1.mlp.experts.3.gate_proj.weight"),
    ],
)
def test_experts_are_modules(tmp_path: Path, model_type: str, experts: str, name: str) -> None:
    model = StreamedModel(make_tiny_decoder(tmp_path, model_type))
    (ids, *_) = _batches()
    block = model.block(1)
    hidden = model.run_block(model.block(0), 0, model.embed(ids))
    seen: list[torch.Tensor] = []
    layer = block.get_submodule(experts)
    assert isinstance(layer, Experts)
    layer.register_forward_hook(lambda _, given, made: seen.extend((*given, made)))
    model.run_block(block, 1, hidden)

    assert model.checkpoint_name(1, f"{experts}.3.{layer.names.gate}.weight") == name
    inputs, chosen, weights, output = seen
    assert inputs.shape == (ids.numel(), hidden.shape[-1])
    again = torch.zeros_like(output)
    for e, expert in layer.items():
        tokens = expert.routed_tokens
        assert tokens.tolist() == (chosen == int(e)).any(1).nonzero()[:, 0].tolist()
        # Weights are those of the same tokens, in the same order.
        own = (weights * (chosen == int(e))).sum(1)[tokens]
        assert torch.equal(expert.routing_weights, own)
        again[tokens] += expert(inputs[tokens]) * own[:, None]
    torch.testing.assert_close(again, output)
    assert sum(len(expert.routed_tokens) for expert in layer.values()) == chosen.numel()


def test_an_expert_that_no_token_goes_to(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_decoder(tmp_path, "qwen3_moe"))
    block = model.block(0)
    output = model.run_block(block, 0, model.embed(torch.tensor([[5]])))
    assert output.isfinite().all()
    counts = [len(expert.routed_tokens) for expert in block.get_submodule("mlp.experts").values()]
    assert sorted(counts) == [0, 0, 1, 1]


def test_names_of_what_is_not_there_yet(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_decoder(tmp_path / "a", "mixtral"))
    assert model.checkpoint_name(0, "mlp.experts.2.w2.qweight") == (
        "model.layers.0.block_sparse_moe.experts.2.w2.qweight"
    )
    assert model.checkpoint_name(1, "mlp.gate") == "model.layers.1.block_sparse_moe.gate"
    assert model.checkpoint_name(1, "self_attn.o_proj") == "model.layers.1.self_attn.o_proj"
    model = StreamedModel(make_tiny_decoder(tmp_path / "b", "llava"))
    assert model.block_name(1) == "language_model.model.layers.1"
    assert model.checkpoint_name(1, "mlp.up_proj.scales") == (
        "language_model.model.layers.1.mlp.up_proj.scales"
    )


def test_missing_and_unexpected_tensors_by_the_checkpoints_names(tmp_path: Path) -> None:
    folder = make_tiny_decoder(tmp_path, "mixtral")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    experts = "model.layers.0.block_sparse_moe.experts"
    del tensors[f"{experts}.1.w2.weight"]
    tensors[f"{experts}.2.w3.weight"] = torch.zeros(8, 8)
    tensors[f"{experts}.2.w4.weight"] = torch.zeros(8, 8)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # stale: no error
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        StreamedModel(folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert f"{experts}.1.w2.weight: tensor is missing" in text
    assert f"{experts}.2.w3.weight: shape [8, 8] where config.json means [96, 64]" in text
    assert f"{experts}.2.w4.weight: unexpected tensor" in text


def test_tensors_that_the_model_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three convolutions of the file are one in the model: read, and found missing."""
    settings = {
        **TINY_DECODERS["llama"],
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    monkeypatch.setitem(TINY_DECODERS, "olmo_hybrid", settings)
    folder = make_tiny_decoder(tmp_path, "olmo_hybrid")
    convolutions = {f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"}
    assert convolutions < set(_agrees(folder).block_tensors(0))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(convolutions)[0])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"q_conv1d\.weight, .*v_conv1d\.weight do not make"):
        StreamedModel(folder)


def test_tensors_that_are_of_no_use_are_no_error(tmp_path: Path) -> None:
    """Masks that old releases stored, and a layer that predicts the token after the next."""
    for model_type, name in (
        ("gptj", "transformer.h.1.attn.masked_bias"),
        ("deepseek_v3", "model.layers.2.mlp.gate.weight"),
    ):
        path = make_tiny_decoder(tmp_path / model_type, model_type) / "model.safetensors"
        tensors = {**load_file(path), name: torch.zeros(2, 2)}
        save_file(tensors, path, metadata={"format": "pt"})
        StreamedModel(path.parent)
    tensors = {**load_file(path), name.replace("layers.2", "layers.3"): torch.zeros(2, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.gate\.weight: unexpected"):
        StreamedModel(path.parent)


def test_names_of_another_time(tmp_path: Path) -> None:
    """GPT-NeoX's head, Bloom without a prefix: as published. And names that nobody knows."""
    neox = make_tiny_decoder(tmp_path / "neox", "gpt_neox")
    _rename(neox, r"^lm_head\.", "embed_out.")
    _agrees(neox)
    bloom = make_tiny_decoder(tmp_path / "bloom", "bloom")
    _rename(bloom, r"^transformer\.", "")
    assert _agrees(bloom).block_name(1) == "h.1"
    odd = make_tiny_decoder(tmp_path / "odd", "llama")
    _rename(odd, r"self_attn\.q_proj", "attention.query")
    with pytest.raises(UserError) as caught:
        StreamedModel(odd)
    assert "model.layers.0.self_attn.q_proj.weight: tensor is missing" in str(caught.value)
    assert "model.layers.1.attention.query.weight: unexpected tensor" in str(caught.value)


def _rename(folder: Path, pattern: str, replacement: str) -> None:
    path = folder / "model.safetensors"
    tensors = {re.sub(pattern, replacement, k): t for k, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_vision_tower_is_neither_needed_nor_in_the_way(tmp_path: Path) -> None:
    folder = make_tiny_decoder(tmp_path, "qwen2_5_vl")
    path = folder / "model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if not k.startswith("visual")}
    assert len(tensors) < len(load_file(path))
    whole = load_decoder(folder)
    save_file(tensors, path, metadata={"format": "pt"})
    ids = _batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(StreamedModel(folder).logits([ids])[0], whole(ids).logits)


def test_another_reader(tmp_path: Path) -> None:
    """Whatever has TensorReader's interface: here one that doubles the last norm."""
    from mlcawq.checkpoint.tensors import TensorReader

    class Doubled(TensorReader):
        def torch(self, name: str) -> torch.Tensor:
            tensor = super().torch(name)
            return 2 * tensor if name == "model.norm.weight" else tensor

    folder = make_tiny_decoder(tmp_path, "qwen2")
    ids = _batches()[0]
    plain = StreamedModel(folder).logits([ids])[0]
    doubled = StreamedModel(folder, reader=Doubled(folder)).logits([ids])[0]
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("cpmant", {"dim_head": 16, "dim_ff": 96}, "adds to the text"),
        ("xlm", {"n_layers": 2, "n_heads": 4, "emb_dim": 64}, "does more between its blocks"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    monkeypatch.setitem(TINY_DECODERS, model_type, settings)
    folder = make_tiny_decoder(tmp_path, model_type)
    with pytest.raises(UserError, match=reason):
        StreamedModel(folder)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_quantized_experts_are_dequantized(tmp_path: Path, model_type: str) -> None:
    awq, plain = make_awq_mixture(tmp_path, model_type)
    ids = _batches()[0]
    with torch.no_grad():
        expected = load_decoder(plain)(ids).logits
    torch.testing.assert_close(StreamedModel(awq).logits([ids])[0], expected, rtol=1e-4, atol=1e-4)


def test_computing_in_bfloat16(tmp_path: Path) -> None:
    folder = make_tiny_decoder(tmp_path, "gemma2", dtype="bfloat16")
    ids = _batches()[0]
    with torch.no_grad():
        expected = load_decoder(folder, torch.bfloat16)(ids).logits.float()
    found = StreamedModel(folder, torch.bfloat16).logits([ids])[0]
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_two_generations_of_config(tmp_path: Path) -> None:
    new = make_tiny_decoder(tmp_path / "5", "granite")
    old = make_tiny_decoder(tmp_path / "4", "granite")
    config = json.loads((old / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    (old / "config.json").write_text(json.dumps(config))
    ids = _batches()[0]
    assert torch.equal(StreamedModel(old).logits([ids])[0], StreamedModel(new).logits([ids])[0])
    assert StreamedModel(old).config.dtype == "float16"
