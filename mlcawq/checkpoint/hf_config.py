"""config.json in a form that transformers 4 and 5 both read alike.

transformers 4 knows `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 knows `dtype`
and `rope_parameters`, and still accepts the older names. A file that carries both is understood
by either, and by readers (AutoAWQ, MLC) that only ever learned the first.
"""

from __future__ import annotations

from typing import Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.checkpoint.decoder_config import DecoderConfig


def portable_config(
    config: ModelConfig | DecoderConfig, *, dtype: str | None = None
) -> dict[str, Any]:
    """`config.raw` with dtype and rotary parameters in both generations' keys.

    dtype: recorded type of the unquantized tensors; that of `config` when None. A
    `quantization_config` is carried over as it is.
    """
    raw = _portable(config.raw, dtype or config.dtype)
    if isinstance(text := raw.get("text_config"), dict):
        raw["text_config"] = _portable(text, dtype or config.dtype)
    return raw


def _portable(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    raw = dict(raw)
    raw["torch_dtype"] = raw["dtype"] = dtype
    # The given parameters are kept as written: a key that is absent may mean something else
    # than the same key with its default (longrope's factor does).
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in given.values()):
        _add_old_keys_of_layer_types(raw, given)
        return raw
    theta = given.pop("rope_theta", None) or raw.get("rope_theta")
    if theta is None and not given:
        return raw  # the class has its own default, or no rotary embedding
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    rope = {"rope_type": kind, **given}
    raw["rope_parameters"] = {**rope}
    if theta is not None:
        raw["rope_theta"] = raw["rope_parameters"]["rope_theta"] = theta
    if kind == "longrope" and "original_max_position_embeddings" in given:
        # transformers 4 looks for it beside rope_scaling, and takes the factor from it.
        original = given["original_max_position_embeddings"]
        raw.setdefault("original_max_position_embeddings", original)
    if "partial_rotary_factor" in given:
        raw.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
    raw["rope_scaling"] = None if kind == "default" else rope
    return raw


def _add_old_keys_of_layer_types(raw: dict[str, Any], given: dict[str, Any]) -> None:
    """Gemma 3's way in transformers 4: the windowed layers' base in a key of its own."""
    full, local = given.get("full_attention"), given.get("sliding_attention")
    if isinstance(full, dict):
        scaling = {key: value for key, value in full.items() if key != "rope_theta"}
        raw.setdefault("rope_theta", full.get("rope_theta"))
        raw["rope_scaling"] = None if scaling.get("rope_type") in (None, "default") else scaling
    if isinstance(local, dict):
        raw.setdefault("rope_local_base_freq", local.get("rope_theta"))
