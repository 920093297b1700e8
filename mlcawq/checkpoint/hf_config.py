"""config.json in a form that transformers 4 and 5 both read alike.

transformers 4 knows `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 knows `dtype`
and `rope_parameters`, and still accepts the older names. A file that carries both is understood
by either, and by readers (AutoAWQ, MLC) that only ever learned the first.
"""

from __future__ import annotations

from typing import Any

from mlcawq.checkpoint.config import ModelConfig


def portable_config(config: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """`config.raw` with dtype and rotary parameters in both generations' keys.

    dtype: recorded type of the unquantized tensors; that of `config` when None. A
    `quantization_config` is carried over as it is.
    """
    raw = dict(config.raw)
    raw["torch_dtype"] = raw["dtype"] = dtype or config.dtype

    # The given parameters are kept as written: a key that is absent may mean something else
    # than the same key with its default (longrope's factor does).
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    for key in ("rope_theta", "type", "rope_type"):
        given.pop(key, None)
    rope = {"rope_type": config.rope.rope_type, **given}
    raw["rope_theta"] = config.rope.theta
    raw["rope_parameters"] = {**rope, "rope_theta": config.rope.theta}
    if config.rope.rope_type == "longrope" and "original_max_position_embeddings" in given:
        # transformers 4 looks for it beside rope_scaling, and takes the factor from it.
        original = given["original_max_position_embeddings"]
        raw.setdefault("original_max_position_embeddings", original)
    raw["rope_scaling"] = None if config.rope.rope_type == "default" else rope
    return raw
