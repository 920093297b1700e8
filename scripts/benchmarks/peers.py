"""The kernels of other projects, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import GROUP_SIZE, Case
from benchmarks.contenders import Apply, UnavailableError

_BITS = 4


@dataclass(frozen=True)
class Humming:
    """humming-kernels: kernels compiled when they are first used, for the shape and the GPU."""

    name: str = "humming"
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        layers = _module("humming.layer", "pip install 'humming-kernels[cu13]'")
        config = {"quant_method": "awq", "bits": _BITS, "group_size": GROUP_SIZE}
        names = ("qweight", "qzeros", "scales")

        def copy() -> Apply:
            layer = layers.HummingLayer(
                shape_n=case.linear.N,
                shape_k=case.linear.K,
                weight_config=dict(config),
                torch_dtype=torch.float16,
            ).to(case.device)
            layer.load_from_tensors(dict(zip(names, case.stock, strict=True)))
            layer.transform()
            return layer.forward

        return copy


@dataclass(frozen=True)
class MarlinOfVllm:
    """Marlin as vLLM calls it for AWQ checkpoints."""

    name: str = "Marlin (vllm)"
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        install = "pip install vllm"
        ops = _module("vllm._custom_ops", install)
        utils = _module("vllm.model_executor.layers.quantization.utils.marlin_utils", install)
        types = _module("vllm.scalar_type", install).scalar_types
        K, N = case.linear.K, case.linear.N
        groups = K // GROUP_SIZE
        qweight = ops.awq_marlin_repack(case.qweight, size_k=K, size_n=N, num_bits=_BITS)
        scales = utils.marlin_permute_scales(case.scales, K, N, GROUP_SIZE)
        zeros = utils.awq_to_marlin_zero_points(case.qzeros, groups, N, _BITS)
        none = torch.empty(0, dtype=torch.int32, device=case.device)
        workspace = utils.marlin_make_workspace_new(case.device)

        def copy() -> Apply:
            own = [tensor.clone() for tensor in (qweight, scales, zeros)]
            return lambda x: utils.apply_awq_marlin_linear(
                input=x,
                weight=own[0],
                weight_scale=own[1],
                weight_zp=own[2],
                g_idx=none,
                g_idx_sort_indices=none,
                workspace=workspace,
                quant_type=types.uint4,
                output_size_per_partition=N,
                input_size_per_partition=K,
            )

        return copy


@dataclass(frozen=True)
class MarlinOfGptqmodel:
    """Marlin as gptqmodel compiles and calls it."""

    name: str = "Marlin (gptqmodel)"
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        module = _module("gptqmodel.nn_modules.qlinear.marlin_awq", "pip install gptqmodel")

        def copy() -> Apply:
            layer = module.AwqMarlinLinear(
                bits=_BITS,
                group_size=GROUP_SIZE,
                desc_act=False,
                sym=False,
                in_features=case.linear.K,
                out_features=case.linear.N,
                register_buffers=True,
            ).to(case.device)
            layer.qweight.data = case.qweight.clone()
            layer.qzeros.data = case.qzeros.clone()
            layer.scales.data = case.scales.clone()
            layer.post_init()
            return layer.forward

        return copy


@dataclass(frozen=True)
class Torchao:
    """torchao's int4 weights: its own rounding of the same weights, hence the tolerance."""

    name: str = "torchao"
    tolerance: float = 8e-2
    dtype: torch.dtype = torch.bfloat16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        quantization = _module("torchao.quantization", "pip install torchao mslk")
        weight = case.dense(torch.float32).t().contiguous().bfloat16()

        def copy() -> Apply:
            layer = torch.nn.Linear(
                case.linear.K, case.linear.N, bias=False, dtype=self.dtype, device="meta"
            )
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=GROUP_SIZE))
            return layer.forward

        return copy


PEERS = (Humming(), MarlinOfVllm(), MarlinOfGptqmodel(), Torchao())


def _module(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{error} ({install})") from None
