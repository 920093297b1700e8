"""AWQ loading for every model of mlc_llm, from its own Hugging Face mapping."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlc_llm.loader import ExternMapping
from mlc_llm.model import MODELS
from mlc_llm.quantization.model_quantization import make_awq_quant

_PARTS = ("qweight", "qzeros", "scales")
_OWN_AWQ = ("llava", "eagle")  # a second model beside the decoder: mlc_llm's own mapping


def register() -> None:
    """Give every model that has a Hugging Face mapping an AWQ source and quantization."""
    for name, model in MODELS.items():
        if name in _OWN_AWQ or "huggingface-safetensor" not in model.source:
            continue
        model.quantize["awq"] = make_awq_quant(model.model)
        model.source["awq"] = _mapping_of(model)


def _mapping_of(model: Any) -> Any:
    def awq(model_config: Any, quantization: Any) -> ExternMapping:
        dense = model.source["huggingface-safetensor"](model_config, quantization)
        quantized, _ = model.quantize["awq"](model_config, quantization)
        _, named_params, _ = quantized.export_tvm(
            spec=quantized.get_default_spec(), allow_extern=True
        )
        mapping = ExternMapping(unused_params=set(dense.unused_params))
        for name, param in named_params:
            linear, _, part = name.rpartition(".")
            if part not in _PARTS:
                mapping.add_mapping(name, dense.param_map[name], dense.map_func[name])
                continue
            sources = dense.param_map[f"{linear}.weight"]
            mapping.add_mapping(
                name,
                [f"{source.removesuffix('.weight')}.{part}" for source in sources],
                _concatenation(param.dtype),
            )
        return mapping

    return awq


def _concatenation(dtype: str) -> Any:
    def concatenate(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, axis=1).astype(dtype)

    return concatenate
