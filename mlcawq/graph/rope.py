"""Rotary frequencies (arXiv 2104.09864) of every scaling that the supported families use.

Frequencies are computed once, here, and compiled into the library as a table. The rules are those
of transformers (`ROPE_INIT_FUNCTIONS`), which are what the checkpoints were trained or tuned with.
"""

from __future__ import annotations

import math

import numpy as np

from mlcawq.checkpoint.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position for each pair of a head, float32 [head_dim/2], and the factor that
    multiplies cos and sin.

    They hold for positions below `context_limit(config)`.
    """
    params, theta, dim = config.rope.params, config.rope.theta, config.head_dim
    plain = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    scale = 1.0
    rope_type = config.rope.rope_type
    if rope_type in ("default", "dynamic"):
        frequencies = plain
    elif rope_type == "linear":
        frequencies = plain / params["factor"]
    elif rope_type == "llama3":
        frequencies = _llama3(plain, params)
    elif rope_type == "yarn":
        frequencies, scale = _yarn(plain, theta, dim, params)
    elif rope_type == "longrope":
        frequencies = plain / np.asarray(params["short_factor"], np.float64)
        scale = _longrope_scale(config)
    else:
        raise ValueError(f"rope type {rope_type!r} is not one of mlcawq.checkpoint.config's")
    return frequencies.astype(np.float32), float(scale)


def context_limit(config: ModelConfig) -> tuple[int | None, str]:
    """How many positions one compiled library can serve exactly, and why; (None, "") when any.

    - Dynamic NTK and LongRoPE change all frequencies once a sequence grows past the original
      length, so keys that are already cached would have to be rotated again.
    - A sliding window is the same as full attention only while a sequence fits into it.
    """
    limits: list[tuple[int, str]] = []
    if config.rope.rope_type == "dynamic":
        limits.append(
            (
                config.max_position_embeddings,
                "its dynamic rope changes all frequencies beyond that length",
            )
        )
    if config.rope.rope_type == "longrope":
        limits.append(
            (
                int(config.rope.params["original_max_position_embeddings"]),
                "its longrope switches to other frequencies beyond that length",
            )
        )
    if config.sliding_window is not None:
        limits.append(
            (config.sliding_window, "its layers attend to a sliding window of that length")
        )
    return min(limits) if limits else (None, "")


def _llama3(plain: np.ndarray, params: dict) -> np.ndarray:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, a ramp between."""
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * plain / (2 * math.pi)
    if high == low:
        return np.where(turns < low, plain / factor, plain)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / factor + kept * plain


def _yarn(plain: np.ndarray, theta: float, dim: int, params: dict) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolation pair by pair, a temperature on cos and sin."""
    factor = params["factor"]
    original = params["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(params.get("beta_fast") or 32)
    high = pair_turning(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = params.get("attention_factor")
    if scale is None:
        mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        if mscale and all_dim:
            scale = temperature(mscale) / temperature(all_dim)
        else:
            scale = temperature(1.0)
    return frequencies, scale


def _longrope_scale(config: ModelConfig) -> float:
    params = config.rope.params
    if params.get("attention_factor") is not None:
        return params["attention_factor"]
    original = params["original_max_position_embeddings"]
    factor = params.get("factor")
    if factor is None:
        factor = config.max_position_embeddings / original
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
