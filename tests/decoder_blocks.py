"""Decoder blocks of every architecture with random weights, and how their models call them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_decoders import TINY_DECODERS, randomize
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mlcawq.checkpoint.experts import USUAL_NAMES, ExpertNames, unfused
from mlcawq.families import ARCHITECTURES

# Switches that change a block's layout, beside the settings of TINY_DECODERS.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon rw": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_bigcode heads": ("gpt_bigcode", {"multi_query": False}),
    "bloom residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "opt 350m": ("opt", {"do_layer_norm_before": False}),
    "opt galactica": ("opt", {"activation_function": "gelu"}),
    "mpt clipped": ("mpt", {"attn_config": {"clip_qkv": 1.0}}),
    "olmo unclipped": ("olmo", {"clip_qkv": None}),
    "deepseek_v2 lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "cohere qk_norm": ("cohere", {"use_qk_norm": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
PLAIN = [name for name in TINY_DECODERS if name in ARCHITECTURES]
CASES = [*PLAIN, *VARIANTS]


@dataclass
class DecoderBlock:
    """A block of a random model.

    arguments: keyword arguments of its call for a batch and a number of tokens.
    """

    model_type: str
    module: nn.Module
    arguments: Callable[[int, int], dict[str, Any]]
    config: Any

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.module(hidden, **self.arguments(*hidden.shape[:2]))
        return output[0] if isinstance(output, tuple) else output


def decoder_blocks(case: str) -> list[DecoderBlock]:
    """Both blocks of the tiny model of a case."""
    model_type, changes = VARIANTS.get(case, (case, {}))
    changes = {
        "vocab_size": 400,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    settings = dict(TINY_DECODERS[model_type])
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **changes}
        config = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    else:
        config = AutoConfig.for_model(model_type, **{**settings, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unfused(model, ExpertNames("w1", "w3", "w2") if model_type == "mixtral" else USUAL_NAMES)
    randomize(model)
    model.eval().requires_grad_(False)
    text = getattr(model.base_model, "language_model", model.base_model)
    text = getattr(text, "decoder", text)
    layers = next(
        module
        for name, module in text.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == 2
    )
    plans: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def arguments(i: int) -> Callable[[int, int], dict[str, Any]]:
        def of_layer(batch: int, tokens: int) -> dict[str, Any]:
            if (batch, tokens) not in plans:
                plans[batch, tokens] = _calls(text, layers, batch, tokens)
            return plans[batch, tokens][i]

        return of_layer

    text_config = config.get_text_config()
    return [
        DecoderBlock(model_type, layer, arguments(i), text_config) for i, layer in enumerate(layers)
    ]


def distinct_blocks(case: str) -> list[DecoderBlock]:
    """As `decoder_blocks`, without a first one that is like the second."""
    first, second = decoder_blocks(case)
    alike = list(first.module.state_dict()) == list(second.module.state_dict())
    return [second] if alike else [first, second]


def _calls(text: nn.Module, layers: nn.ModuleList, batch: int, tokens: int) -> list[dict[str, Any]]:
    """The keyword arguments that each layer is called with."""
    seen: list[dict[str, Any]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(_by_keyword(_, args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        text(input_ids=torch.zeros(batch, tokens, dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _by_keyword(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(layer.forward).parameters)
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    values.pop("hidden_states", None)
    return values
