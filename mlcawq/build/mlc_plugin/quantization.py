"""AWQ in mlc_llm's terms: one entry of its QUANTIZATION for every name that we build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlc_llm.loader import QuantizeMapping
from mlc_llm.nn.expert import MixtralExperts
from mlc_llm.quantization import QUANTIZATION
from mlc_llm.quantization.awq_quantization import AWQQuantize
from mlc_llm.quantization.utils import is_final_fc, is_moe_gate
from tvm.relax.frontend import nn

from mlcawq.build.mlc_plugin.experts import AwqExperts
from mlcawq.build.mlc_plugin.linear import AwqLinear
from mlcawq.build.weight_plan import Relayout
from mlcawq.errors import Problem, raise_all
from mlcawq.graph.settings import QUANTIZATIONS, quantization_named
from tir_kernels.layouts import AUTOAWQ, TILED, ExpertsShape, LinearShape

Wanted = Callable[[str], bool]


@dataclass
class AwqQuantization(AWQQuantize):
    """As mlc_llm's, with what it does not know of a checkpoint.

    weight_layout: of the quantized weights, one of `graph.settings.MLC_LAYOUTS`.
    zero_point: False for symmetric checkpoints, which may come without qzeros.
    modules_to_not_convert: parts of Hugging Face names whose linears stay in model_dtype.
    """

    weight_layout: str = AUTOAWQ
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()

    def quantize_model(
        self,
        model: nn.Module,
        quant_map: QuantizeMapping,
        name_prefix: str,
        wanted: Wanted | None = None,
    ) -> nn.Module:
        """Replace linears and experts of `model` by quantized ones; returns the model.

        wanted: which of the linears that could be replaced, by name; None for all. The head and
        the gates of experts never are.
        Raises UserError naming every linear whose sizes the format cannot hold.
        """
        return quantize_linears(model, self, wanted, name_prefix)[0]

    def relayout(
        self, linear: str, part: str, shape: LinearShape, model_config: Any
    ) -> Relayout | None:
        """How array `part` of a linear gets from the stock layout into `weight_layout`.

        Experts stay in the stock layout, the only one that their kernels read.
        """
        if self.weight_layout == AUTOAWQ or isinstance(shape, ExpertsShape):
            return None
        stock, _ = shape.parameters(AUTOAWQ)[part]
        return Relayout(TILED, part, stock, interleaved(linear, model_config))


def interleaved(linear: str, model_config: Any) -> bool:
    """Whether the tiled layout interleaves gate and up of a linear: where silu(gate) * up follows.

    Every model of mlc_llm whose gate and up are one linear calls it so, and names another
    activation than silu in its config.
    """
    config = getattr(model_config, "text_config", None) or model_config
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    return linear.endswith(".gate_up_proj") and activation in (None, "silu", "swish")


def quantize_linears(
    model: nn.Module,
    config: AwqQuantization,
    wanted: Wanted | None = None,
    prefix: str = "",
) -> tuple[nn.Module, dict[str, LinearShape]]:
    """As `AwqQuantization.quantize_model`; also returns what was quantized, by name."""
    mutator = _Quantizer(config, wanted)
    model.to(dtype=config.model_dtype)
    model = mutator.visit(prefix, model)
    raise_all(mutator.problems)
    return model, mutator.quantized


class _Quantizer(nn.Mutator):
    def __init__(self, config: AwqQuantization, wanted: Wanted | None) -> None:
        super().__init__()
        self.config = config
        self.wanted = wanted
        self.quantized: dict[str, LinearShape] = {}
        self.problems: list[Problem] = []

    def visit_module(self, name: str, node: nn.Module) -> Any:
        if not isinstance(node, nn.Linear | MixtralExperts):
            return self.visit(name, node)
        if isinstance(node, nn.Linear) and (is_final_fc(name) or is_moe_gate(name, node)):
            return node
        if self.wanted is not None and not self.wanted(name):
            return node
        sizes = (node.in_features, node.out_features, self.config.group_size)
        try:
            if isinstance(node, MixtralExperts):
                experts = ExpertsShape(*sizes, node.num_local_experts)
                self.quantized[name] = experts
                return AwqExperts(experts, self.config)
            self.quantized[name] = LinearShape(*sizes)
        except ValueError as error:
            self.problems.append(Problem(str(error), name))
            return node
        return AwqLinear.from_linear(node, self.config)


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
