"""Reports of quantizations that never were, of any number of layers and experts."""

from __future__ import annotations

from typing import Any

from mlcawq.quantize.recipe import load_recipe
from mlcawq.quantize.report import (
    BlockReport,
    LinearReport,
    ModelReport,
    Report,
    Run,
    Spread,
    Storage,
    Usage,
)

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def linear(name: str, nearest: float = 0.1, found: float = 0.05, **options: Any) -> LinearReport:
    known: dict[str, Any] = {
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "weights": 1024,
        "stored_bytes": 532,
        "scale": Spread(0.25, 0.5, 1.0, 2.0, 4.0, 1.1),
        "clip": Spread(0.6, 0.7, 0.9, 1.0, 1.0, 0.88),
        "tokens": 4096,
    }
    return LinearReport(name, nearest, found, **{**known, **options})


def block(i: int, experts: int = 0, error: float = 0.02, **options: Any) -> BlockReport:
    names = [f"mlp.experts.{e}.{part}" for e in range(experts) for part in _MLP] or [
        f"mlp.{part}" for part in _MLP
    ]
    linears = tuple(linear(name, **options) for name in (*_ATTENTION, *names))
    return BlockReport(f"model.layers.{i}", error, linears)


def report(layers: int = 2, experts: int = 0, **changes: Any) -> Report:
    total = Usage(3.5 * layers + 1, 2_000_000_000)
    known: dict[str, Any] = {
        "model": "acme/model",
        "model_type": "qwen3_moe" if experts else "llama",
        "recipe": load_recipe("awq").model_dump(mode="json"),
        "calibration": {"source": "bundled", "sequences": 8, "tokens": 512, "digest": "5e" * 32},
        "versions": {"mlcawq": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "fingerprint": "fe" * 32,
        "blocks": tuple(block(i, experts) for i in range(layers)),
        "measured": ModelReport(2048, 0.0331, 0.94, 8.4, 8.2, seen=False),
        "storage": Storage(4_000_000, 1_000_000),
        "run": Run("cpu", total, (Usage(3.5, 2_000_000_000),) * layers),
    }
    return Report(**{**known, **changes})
