"""AWQ for every model of mlc_llm, from the mapping it has for unquantized weights.

The mapping names, for the weight of each linear, the weights of the checkpoint that make it up.
In an AWQ checkpoint three arrays stand in the place of each, and are put together alike. Whatever
is not quantized is made as the mapping says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mlc_llm.loader import LOADER, ExternMapping, QuantizeMapping
from mlc_llm.model import MODELS
from tvm.relax.frontend import nn

from mlcawq.build.mlc_plugin.mapping import PARTS, AwqMapping
from mlcawq.build.mlc_plugin.quantization import AwqQuantization, quantize_linears
from mlcawq.build.mlc_plugin.rows import Fuse, by_expert, fuse_columns, fuse_words
from mlcawq.build.mlc_plugin.tensor_loader import awq_loader
from mlcawq.build.weight_plan import Relayout
from mlcawq.errors import Problem, UserError, raise_all
from tir_kernels.layouts import AUTOAWQ, SYMMETRIC_ZEROS, ExpertsShape, LinearShape

_FLOAT_SOURCE = "huggingface-safetensor"
# Models of two networks, which mlc_llm quantizes and maps for AWQ by hand.
_OWN_AWQ = ("llava", "eagle")


def register() -> None:
    """Give every model that mlc_llm loads from Hugging Face an AWQ source and quantization."""
    LOADER["awq"] = awq_loader
    for name, model in MODELS.items():
        if name not in _OWN_AWQ and _FLOAT_SOURCE in model.source:
            family = _Family(model)
            model.quantize["awq"] = family.quantize
            model.source["awq"] = family.mapping


class _Family:
    """The AWQ functions of one of mlc_llm's models, as its registry wants them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def quantize(
        self, model_config: Any, quantization: AwqQuantization
    ) -> tuple[nn.Module, QuantizeMapping]:
        """The model with quantized linears. Raises UserError where they cannot be made."""
        module, _, _ = self._quantized(model_config, quantization)
        return module, QuantizeMapping({}, {})

    def mapping(self, model_config: Any, quantization: AwqQuantization) -> AwqMapping:
        """What makes each of its parameters. Raises UserError as `quantize` does."""
        module, linears, dense = self._quantized(model_config, quantization)
        mapping = AwqMapping(
            unused_params=set(dense.unused_params),
            linears=linears,
            symmetric=not quantization.zero_point,
        )
        for name, parameter in module.named_parameters():
            linear, _, part = name.rpartition(".")
            if linear not in linears or part not in PARTS:
                mapping.add_mapping(name, dense.param_map[name], dense.map_func[name])
                mapping.shapes[name] = tuple(
                    size if isinstance(size, int) else None for size in parameter.shape
                )
                continue
            sources = dense.param_map[f"{linear}.weight"]
            function = _Fused(
                part,
                dense.map_func[f"{linear}.weight"],
                linears[linear],
                str(parameter.dtype),
                quantization.relayout(linear, part, linears[linear], model_config),
            )
            names = [f"{source.removesuffix('.weight')}.{part}" for source in sources]
            mapping.add_mapping(name, names, function)
        return mapping

    def _quantized(
        self, model_config: Any, quantization: AwqQuantization
    ) -> tuple[nn.Module, dict[str, LinearShape], ExternMapping]:
        if getattr(model_config, "tensor_parallel_shards", 1) > 1:
            raise UserError.one(
                "AWQ weights cannot be split over several devices",
                fix="leave --tensor-parallel-shards out, or choose another quantization",
            )
        dense = self.model.source[_FLOAT_SOURCE](model_config, quantization)
        choice = _Choice(dense, quantization.modules_to_not_convert)
        module, linears = quantize_linears(self.model.model(model_config), quantization, choice)
        raise_all(choice.problems)
        return module, linears, dense


class _Choice:
    """Which linears AWQ quantizes: those of the decoder blocks, but for modules_to_not_convert."""

    def __init__(self, dense: ExternMapping, skipped: Sequence[str]) -> None:
        self.dense = dense
        self.skipped = skipped
        self.problems: list[Problem] = []

    def __call__(self, linear: str) -> bool:
        sources = self.dense.param_map.get(f"{linear}.weight", [])
        if not sources or not any(part.isdigit() for part in linear.split(".")):
            return False
        # transformers and AutoAWQ match these names as substrings.
        kept = [source for source in sources if any(name in source for name in self.skipped)]
        if kept and len(kept) < len(sources):
            self.problems.append(
                Problem(
                    f"{', '.join(kept)} is left unquantized and the rest of {linear} is not; "
                    "mlc_llm computes them as one linear",
                    "modules_to_not_convert",
                    "quantize all of them, or none",
                )
            )
        return not kept


class _Fused:
    """Makes one array of a quantized linear from the arrays of its sources, none for the zeros of a
    symmetric checkpoint.
    """

    def __init__(
        self, part: str, fuse: Fuse, shape: LinearShape, dtype: str, relayout: Relayout | None
    ) -> None:
        self.part = part
        self.fuse = fuse
        self.shape = shape
        self.dtype = dtype
        self.relayout = relayout

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        if self.part == "scales":
            fused: np.ndarray = fuse_columns(self.fuse, arrays).astype(self.dtype)
        elif arrays:
            fused = fuse_words(self.fuse, arrays)
        else:
            stock, _ = self.shape.parameters(AUTOAWQ)[self.part]
            fused = np.full(stock, SYMMETRIC_ZEROS, np.int32)
        if arrays and isinstance(self.shape, ExpertsShape):
            fused = by_expert(fused, self.shape.experts)
        tiled = fused if self.relayout is None else self.relayout(fused)
        return tiled.view(self.dtype)
