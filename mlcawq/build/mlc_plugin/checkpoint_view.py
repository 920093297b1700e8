"""A checkpoint as mlc_llm can read it: the same files, with config.json in the older form.

transformers 5 writes `rope_parameters` and `dtype` where mlc_llm looks for `rope_theta`,
`rope_scaling` and `torch_dtype`, and takes a default in silence where it does not find them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import load_json

# What an architecture calls the share of a head that is rotated, where not partial_rotary_factor.
_ROTARY_SHARE = {"gpt_neox": "rotary_pct"}


@dataclass(frozen=True)
class CheckpointView:
    """checkpoint: the folder as it is. raw: its config.json as it is. config: the config.json that
    mlc_llm is given, in a temporary folder of links to the other files of the checkpoint.
    """

    checkpoint: Path
    raw: dict[str, Any]
    config: Path

    @property
    def where(self) -> str:
        """config.json as the user knows it."""
        return str(self.checkpoint / self.config.name)

    @property
    def is_awq(self) -> bool:
        given = self.raw.get("quantization_config")
        return isinstance(given, Mapping) and given.get("quant_method") == "awq"


def open_view(config: Path, until: ExitStack) -> CheckpointView:
    """The view of the checkpoint that `config` belongs to; `until` removes it when it closes.

    mlc_llm writes an index into a checkpoint without one: the view also keeps that out of there.
    Raises UserError when `config` is not a JSON object.
    """
    raw = load_json(config)
    checkpoint = config.absolute().parent
    folder = Path(until.enter_context(tempfile.TemporaryDirectory(prefix="mlcawq-view-")))
    for entry in checkpoint.iterdir():
        if entry.name != config.name:
            (folder / entry.name).symlink_to(entry)
    (folder / config.name).write_text(json.dumps(older_form(raw), indent=2), encoding="utf-8")
    return CheckpointView(checkpoint, raw, folder / config.name)


def older_form(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in transformers 4's keys, without the settings of AWQ.

    Newer keys stay beside the older ones, but for `dtype`: some classes of mlc_llm have a field of
    that name for the type in which a graph is first written down. `quantization_config` of AWQ is
    left out, because others take it for that of their fp8 format.
    """
    out = dict(raw)
    if isinstance(out.get("text_config"), Mapping):
        out["text_config"] = older_form(out["text_config"])
    dtype = out.pop("dtype", None)
    if dtype is not None:
        out.setdefault("torch_dtype", dtype)
    rope = out.get("rope_parameters")
    if isinstance(rope, Mapping) and rope:
        out.update(older_rope(rope, str(raw.get("model_type"))))
    experts = out.get("num_local_experts")
    if experts is not None:
        out.setdefault("num_experts", experts)  # Qwen3's mixtures had a name of their own
    quantization = out.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "awq":
        del out["quantization_config"]
    return out


def older_rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """transformers 5's `rope_parameters` as the keys that stood in its place.

    Where layers differ (Gemma 3), the base of the layers with a window has a key of its own, and
    everything else is that of the layers without.
    """
    if all(isinstance(value, Mapping) for value in rope.values()):
        out = older_rope(rope.get("full_attention") or next(iter(rope.values())), model_type)
        local = rope.get("sliding_attention")
        if local is not None and "rope_theta" in local:
            out["rope_local_base_freq"] = _whole(local["rope_theta"])
        return out
    rest = dict(rope)
    rope_type = rest.pop("rope_type", None) or rest.get("type") or "default"
    rest.pop("type", None)
    out = {}
    theta = rest.pop("rope_theta", None)
    if theta is not None:
        out["rope_theta"] = _whole(theta)
    share = rest.pop("partial_rotary_factor", None)
    if share is not None:
        out[_ROTARY_SHARE.get(model_type, "partial_rotary_factor")] = share
    scaling = {"rope_type": rope_type, **rest}
    if rope_type == "longrope":
        scaling["type"] = rope_type  # Phi-3 is read by the oldest name
    out["rope_scaling"] = None if rope_type == "default" else scaling
    return out


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
