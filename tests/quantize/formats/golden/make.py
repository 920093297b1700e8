"""What each format's own tool stores of given integers: run by the Python of that tool.

    python make.py autoawq|llm-awq|compressed-tensors INTEGERS OUT [CHECKOUT]

INTEGERS: integers.npz beside this file, made by `make.py integers integers.npz`. OUT: the .npz to
write, keys "case/tensor". CHECKOUT: of mit-han-lab/llm-awq, which is no package.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHAPE = (256, 32)  # K, N
SMALL = (64, 24)  # of compressed-tensors, which packs output channels that fill no word too
GROUPS = {"autoawq gemm": (32, 64, 128, 256), "autoawq gemv": (64, 128)}
GROUPS |= {"autoawq gemv_fast": (128,), "llm-awq": (128,)}
BITS = (2, 3, 4, 8)


def integers(seed: int = 0) -> dict[str, np.ndarray]:
    """codes and zeros of every number of bits (those of fewer are the low bits), and scales."""
    rng = np.random.default_rng(seed)
    K, N = SHAPE
    scales = rng.uniform(0.001, 0.05, (K // 32, N)).astype(np.float16)
    return {
        "codes": rng.integers(0, 256, (K, N), dtype=np.uint8),
        "zeros": rng.integers(0, 256, (K // 32, N), dtype=np.uint8),
        "scales": scales,
    }


def case(
    given: dict[str, np.ndarray],
    bits: int,
    group: int,
    symmetric: bool = False,
    shape: tuple[int, int] = SHAPE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [K, N], zeros and scales [K/G, N] of one case."""
    (K, N), top = shape, np.uint8(2**bits - 1)
    zeros = given["zeros"][: K // group, :N] & top
    if symmetric:
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    return given["codes"][:K, :N] & top, zeros, given["scales"][: K // group, :N]


def _linear(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray):
    """A torch linear whose weight is what the integers stand for, its scales and zeros [N, K/G]."""
    import torch

    (K, N), group = codes.shape, len(codes) // len(zeros)
    weight = codes.astype(np.float32) - zeros.astype(np.float32).repeat(group, 0)
    weight *= scales.astype(np.float32).repeat(group, 0)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy())
    return linear, torch.from_numpy(scales.T.copy()), torch.from_numpy(zeros.T.astype(np.float32))


def autoawq(given: dict[str, np.ndarray]) -> Iterator[tuple[str, dict]]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.modules.linear.gemv_fast import WQLinear_GEMVFast

    kinds = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}
    for version, kind in kinds.items():
        for group in GROUPS[f"autoawq {version}"]:
            linear, scales, zeros = _linear(*case(given, 4, group))
            if version == "gemm":
                scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
            packed = kind.from_linear(linear, 4, group, scales=scales, zeros=zeros)
            yield f"autoawq {version} {group}", packed.state_dict()


def llm_awq(given: dict[str, np.ndarray], checkout: Path) -> Iterator[tuple[str, dict]]:
    sys.modules["awq_inference_engine"] = types.ModuleType("awq_inference_engine")  # CUDA kernels
    package = types.ModuleType("awq")
    package.__path__ = [str(checkout / "awq")]
    quantize = types.ModuleType("awq.quantize")  # its own __init__ wants a vision library
    quantize.__path__ = [str(checkout / "awq" / "quantize")]
    sys.modules |= {"awq": package, "awq.quantize": quantize}
    kind = importlib.import_module("awq.quantize.qmodule").WQLinear
    for group in GROUPS["llm-awq"]:
        linear, scales, zeros = _linear(*case(given, 4, group))
        packed = kind.from_linear(linear, 4, group, scales=scales, zeros=zeros)
        yield f"llm-awq {group}", packed.state_dict()


def compressed_tensors(given: dict[str, np.ndarray]) -> Iterator[tuple[str, dict]]:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits in BITS:
        for group in (32, SMALL[0]):
            for symmetric in (False, True):
                codes, zeros, scales = case(given, bits, group, symmetric, SMALL)
                state = _state(codes, zeros, scales, bits, symmetric)
                weights = QuantizationArgs(
                    num_bits=bits,
                    symmetric=symmetric,
                    strategy="channel" if group == SMALL[0] else "group",
                    group_size=None if group == SMALL[0] else group,
                )
                scheme = QuantizationScheme(targets=["Linear"], weights=weights)
                pack = BaseCompressor.get_value_from_registry("pack-quantized").compress
                kind = "symmetric" if symmetric else "asymmetric"
                yield f"pack-quantized {bits} {group} {kind}", pack(state, scheme)
    codes, zeros, scales = case(given, 8, SMALL[0], True, SMALL)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, symmetric=True, strategy="channel"),
        input_activations=QuantizationArgs(
            num_bits=8, symmetric=True, strategy="token", dynamic=True
        ),
    )
    state = _state(codes, zeros, scales, 8, True)
    state["weight_zero_point"] = torch.zeros_like(state["weight_zero_point"])
    pack = BaseCompressor.get_value_from_registry("int-quantized").compress
    yield f"int-quantized 8 {SMALL[0]} symmetric", pack(state, scheme)


def _state(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, symmetric: bool
) -> dict:
    """A module's tensors before compression; the library's integers are signed."""
    import torch

    linear, scale, zero = _linear(codes, zeros, scales)
    return {
        "weight": linear.weight.data,
        "weight_scale": scale,
        "weight_zero_point": (zero - 2 ** (bits - 1)).to(torch.int8),
    }


def main(tool: str, first: str, *rest: str) -> None:
    if tool == "integers":
        np.savez_compressed(first, **integers())
        return
    given = dict(np.load(first))
    makers = {"autoawq": autoawq, "compressed-tensors": compressed_tensors}
    made = llm_awq(given, Path(rest[1])) if tool == "llm-awq" else makers[tool](given)
    arrays = {
        f"{name}/{key}": tensor.detach().numpy()
        for name, state in made
        for key, tensor in state.items()
    }
    np.savez_compressed(rest[0], **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
