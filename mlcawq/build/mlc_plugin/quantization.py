"""AWQ in mlc_llm's terms: one entry of its QUANTIZATION for every name that we build."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mlc_llm.loader import QuantizeMapping
from mlc_llm.quantization import QUANTIZATION
from mlc_llm.quantization.awq_quantization import AWQQuantize
from mlc_llm.quantization.utils import is_final_fc, is_moe_gate
from tvm.relax.frontend import nn

from mlcawq.build.mlc_plugin.linear import AwqLinear
from mlcawq.graph.settings import QUANTIZATIONS, quantization_named


@dataclass
class AwqQuantization(AWQQuantize):
    """As mlc_llm's, with what it does not know of a checkpoint.

    weight_layout: of the quantized weights, one of `tir_kernels.layouts.LAYOUTS`.
    zero_point: False for symmetric checkpoints, which may come without qzeros.
    modules_to_not_convert: parts of Hugging Face names whose linears stay in model_dtype.
    """

    weight_layout: str = "autoawq"
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()

    def quantize_model(
        self,
        model: nn.Module,
        quant_map: QuantizeMapping,
        name_prefix: str,
        linears: Collection[str] | None = None,
    ) -> nn.Module:
        """Replace linears of `model` by quantized ones.

        linears: names of those to replace; None for mlc_llm's own rule, all but the head and the
        gates of experts.
        """
        config = self

        class _Mutator(nn.Mutator):
            def visit_module(self, name: str, node: nn.Module) -> Any:
                if not isinstance(node, nn.Linear):
                    return self.visit(name, node)
                if linears is None:
                    wanted = not is_final_fc(name) and not is_moe_gate(name, node)
                else:
                    wanted = name in linears
                return AwqLinear.from_linear(node, config) if wanted else node

        model.to(dtype=self.model_dtype)
        return _Mutator().visit(name_prefix, model)


def register() -> None:
    """Put every AWQ name of ours into mlc_llm's QUANTIZATION, q4f16_autoawq of its own included."""
    for name in QUANTIZATIONS:
        kind = quantization_named(name)
        if kind.group_size is not None:
            QUANTIZATION[name] = AwqQuantization(
                name=name,
                kind="awq",
                group_size=kind.group_size,
                quantize_dtype="int4",
                storage_dtype="uint32",
                model_dtype=kind.dtype,
            )
