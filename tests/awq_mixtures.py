"""Tiny AWQ checkpoints of mixtures of experts, in the form on disk that AutoAWQ writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awq_checkpoints import round_weight
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from tir_kernels.reference import dequantize, pack

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate": 192, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": False,
    },
}
ROUTERS = (".gate", ".shared_expert_gate")


def make_awq_mixture(
    folder: Path,
    family: str,
    group_size: int = 32,
    *,
    quantize_router: bool = False,
    skip: Sequence[str] = (),
) -> tuple[Path, Path]:
    """A random mixture with every expert's linears rounded on their own, and what it stands for:
    the folder with the dequantized weights in float32.

    quantize_router: AutoAWQ does that for families whose routers it does not know, if their
    outputs can be packed. skip: modules_to_not_convert.
    """
    source = make_tiny_model(folder / "source", family, **MIXTURES[family])
    state = load_file(source / "model.safetensors")
    plain = {name: tensor.float() for name, tensor in state.items()}
    for key, tensor in list(state.items()):
        name = key.removesuffix(".weight")
        if tensor.ndim != 2 or ".layers." not in key or any(part in name for part in skip):
            continue
        if name.endswith(ROUTERS) and (not quantize_router or len(tensor) % 8):
            continue
        q, zeros, scales = round_weight(state.pop(key).float().numpy().T, group_size, True)
        words = pack(q), pack(zeros)
        for part, array in zip(("qweight", "qzeros", "scales"), (*words, scales), strict=True):
            state[f"{name}.{part}"] = torch.from_numpy(array)
        plain[key] = torch.from_numpy(dequantize(*words, scales, np.float32).T.copy())
    awq = _write(source, folder / "awq", state)
    config = json.loads((awq / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skip) or None,
    }
    (awq / "config.json").write_text(json.dumps(config, indent=2))
    return awq, _write(source, folder / "plain", plain)


def _write(source: Path, out: Path, state: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    return out
