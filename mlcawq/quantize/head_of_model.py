"""The output head of a streamed model, and the model that has a quantized one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from mlcawq.checkpoint.overlay import Overlay
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.quantize.formats.base import Format, IntegerFormat, LinearSpec
from mlcawq.quantize.head import Head
from mlcawq.quantize.integer import QuantizedWeight
from mlcawq.quantize.specs import final_norm, head_name

_COLUMNS = 4096  # of a head that are float32 at a time


def head_of(model: StreamedModel, device: torch.device) -> Head:
    """The head and the norm before it, to be computed with on `device`."""
    outline = model.outline
    norm = final_norm(outline, model.architecture)
    source = outline.names.source_of(f"{outline.skeleton.head}.weight")
    assert norm is not None  # `checks` has looked for both
    assert source is not None
    return Head(
        head_name(outline),
        outline.reader.info(source).shape[0],
        lambda rows: outline.reader.torch_rows(source, rows).float().to(device),
        norm.to(device),
    )


def norm_tensors(
    model: StreamedModel, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The final norm's state by the checkpoint's names."""
    path = model.architecture.final_norm
    return {
        model.outline.names.stored_name(f"{path}.{name}"): value for name, value in state.items()
    }


def with_head(
    model: StreamedModel, tensors: Mapping[str, torch.Tensor], fmt: Format, spec: LinearSpec
) -> StreamedModel:
    """`model` with what is stored in place of its head and final norm, to predict with.

    tensors: of both, as `fmt` stores them.
    """
    name = f"{head_name(model.outline)}.weight"
    replaced = {key: tensor for key, tensor in tensors.items() if not key.startswith(name[:-6])}
    if isinstance(fmt, IntegerFormat):
        weight = fmt.read(head_name(model.outline), spec, tensors.__getitem__)
        replaced[name] = _dequantized(weight)
    else:
        replaced[name] = tensors[name]
    return StreamedModel(model.folder, model.dtype, reader=Overlay(model.reader, replaced))


def _dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """[N, K] in float16, a few columns at a time."""
    K, N = weight.codes.shape
    result = torch.empty(N, K, dtype=torch.float16)
    for start in range(0, N, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns = replace(
            weight,
            codes=weight.codes[:, part],
            scale=weight.scale[:, part],
            zero=weight.zero[:, part],
        )
        result[part] = columns.dequantized().T
    return result
