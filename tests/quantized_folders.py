"""Tiny folders in any storage format, by plain rounding: what readers of each have to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.formats.base import LinearSpec
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight


def make_quantized_folder(
    source: Path,
    out: Path,
    fmt: str,
    grid: IntegerGrid | None = None,
    *,
    per_channel: bool = False,
    activation_bits: int | None = None,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Round the linears in the blocks of an unquantized llama, mistral or qwen folder.

    Also returns the state dict that the result stands for: float32, in torch's [out, in].
    """
    grid = grid or IntegerGrid(4, 128)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    reference = {name: tensor.float() for name, tensor in state.items()}
    specs: dict[str, LinearSpec] = {}
    for name in list(state):
        if not (name.endswith("_proj.weight") and ".layers." in name):
            continue
        linear, weight = name.removesuffix(".weight"), state.pop(name).float().T.contiguous()
        K, N = weight.shape
        own = IntegerGrid(grid.bits, K if per_channel else grid.group_size, grid.symmetric)
        specs[linear] = LinearSpec(K, N, own, activation_bits)
        rounded = quantize_weight(weight, *full_range(weight, own), own)
        state |= FORMATS[fmt].tensors(linear, rounded, specs[linear])
        reference[name] = rounded.dequantized().T.contiguous()
    if FORMATS[fmt].one_file and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file({name: t.contiguous() for name, t in state.items()}, out / "model.safetensors")
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] = FORMATS[fmt].quantization_config(specs, ["lm_head"])
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    return out, reference
