"""Whether a checkpoint is what a quantization's name says, before anything is done with it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from mlcawq.build.mlc_plugin.checkpoint_view import CheckpointView
from mlcawq.checkpoint.config import AwqConfig, load_json, read_quantization
from mlcawq.errors import UserError
from mlcawq.graph.settings import awq_names, check_mlc_layout


def settle(
    quantization: Any, raw: Mapping[str, Any], where: str, weight_layout: str | None = None
) -> Any:
    """The quantization for one checkpoint: `quantization` with the checkpoint's own settings.

    raw: its config.json. where: opens each message. weight_layout: None for the stock one.
    Quantizations that are not AWQ come back as they are. Raises UserError where the checkpoint's
    method, storage version, bits or group size are not what `quantization` stands for.
    """
    given = raw.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method != "awq":
        if quantization.kind == "awq":
            found = "is not quantized" if given is None else f"is quantized with {method!r}"
            raise UserError.one(
                f"quantization {quantization.name} is for AWQ checkpoints, and this one {found}",
                where,
                "choose another --quantization, or make an AWQ checkpoint with `mlcawq quantize`",
            )
        if weight_layout is not None:
            raise UserError.one(
                f"a weight layout is for AWQ, and {quantization.name} is not",
                fix="leave --weight-layout out",
            )
        return quantization
    awq = read_quantization(dict(raw), where)
    assert awq is not None
    if quantization.kind != "awq":
        raise UserError.one(
            f"the checkpoint is quantized with AWQ already, {quantization.name} cannot be made "
            "of it",
            where,
            f"use --quantization {awq_names(awq.group_size)[0]}, or the unquantized checkpoint",
        )
    return fit(quantization, awq, where, weight_layout)


def fit(quantization: Any, awq: AwqConfig, where: str, weight_layout: str | None = None) -> Any:
    """As `settle`, from the settings themselves."""
    if awq.group_size != quantization.group_size:
        raise UserError.one(
            f"quantization {quantization.name} has groups of {quantization.group_size}, the "
            f"checkpoint has groups of {awq.group_size}",
            where,
            f"use --quantization {' or '.join(awq_names(awq.group_size))}",
        )
    check_mlc_layout(weight_layout)
    return dataclasses.replace(
        quantization,
        zero_point=awq.zero_point,
        modules_to_not_convert=awq.modules_to_not_convert,
        weight_layout=weight_layout or quantization.weight_layout,
    )


def check_model(model: Any, quantization: Any, view: CheckpointView) -> None:
    """Raises UserError where mlc_llm's `model` has no such quantization or does not take the
    config; warns of rotary scaling that it would leave out.
    """
    if quantization.kind not in model.quantize:
        raise UserError.one(
            f"mlc_llm's {model.name} has no quantization of the kind {quantization.kind}",
            view.where,
            "choose another --quantization",
        )
    try:
        config = model.config.from_file(view.config)
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise UserError.one(
            f"mlc_llm's {model.name} does not take this config: {said}",
            view.where,
            "build natively with `mlcawq build` where the family is ours, or use a newer mlc_llm",
        ) from error
    written = load_json(view.config)
    written = written.get("text_config") or written
    config = getattr(config, "text_config", None) or config
    if written.get("rope_scaling") and not getattr(config, "rope_scaling", None):
        sys.stderr.write(
            f"warning: {view.where}: mlc_llm's {model.name} leaves out its rotary scaling "
            f"({written['rope_scaling']}); long contexts will differ from the model's own\n"
        )
