"""A tiny AWQ checkpoint by plain rounding: what the build must read, made by the format's rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mlcawq.checkpoint.config import read_config
from mlcawq.families import find_family
from tir_kernels.reference import dequantize, pack


def round_weight(
    weight: np.ndarray, group_size: int, zero_point: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [K, N] -> q uint8 [K, N], z uint8 [K/G, N], s float16 [K/G, N]."""
    K, N = weight.shape
    groups = weight.reshape(K // group_size, group_size, N)
    if zero_point:
        high, low = groups.max(1), groups.min(1)
        scales = np.maximum(high - low, 1e-5) / 15
        zeros = np.clip(np.round(-low / scales), 0, 15)
    else:
        scales = np.maximum(np.abs(groups).max(1), 1e-5) / 7
        zeros = np.full_like(scales, 8)
    scales = scales.astype(np.float16)
    q = np.round(groups / scales.astype(np.float32)[:, None] + zeros[:, None])
    q = np.clip(q, 0, 15).reshape(K, N)
    return q.astype(np.uint8), zeros.astype(np.uint8), scales


def make_awq_checkpoint(
    source: Path,
    out: Path,
    group_size: int = 32,
    *,
    zero_point: bool = True,
    skip: Iterable[str] = (),
    with_zeros: bool = True,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Quantize the linears of an unquantized folder; also returns the state dict that the result
    stands for: float32, dequantized, in torch's [out, in].
    """
    source, out = Path(source), Path(out)
    config = read_config(source)
    family = find_family(config)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    reference = {name: tensor.float() for name, tensor in state.items()}
    skip = tuple(skip)
    for i in range(config.num_hidden_layers):
        for linear in family.linears:
            name = f"{family.block.format(i)}.{linear}"
            if any(part in name for part in skip):
                continue
            weight = state.pop(f"{name}.weight").float().numpy().T
            q, zeros, scales = round_weight(weight, group_size, zero_point)
            packed, packed_zeros = pack(q), pack(zeros)
            state[f"{name}.qweight"] = torch.from_numpy(packed)
            if with_zeros:
                state[f"{name}.qzeros"] = torch.from_numpy(packed_zeros)
            state[f"{name}.scales"] = torch.from_numpy(scales)
            plain = dequantize(packed, packed_zeros, scales, np.float32)
            reference[f"{name}.weight"] = torch.from_numpy(plain.T.copy())
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, out / "model.safetensors")
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": "gemm",
        "modules_to_not_convert": list(skip) or None,
    }
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    return out, reference
