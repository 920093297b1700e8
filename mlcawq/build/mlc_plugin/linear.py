"""The AWQ linear that mlc_llm's models get: mlc_llm's parameters."""

from __future__ import annotations

from mlc_llm.quantization.awq_quantization import AWQQuantizeLinear


class AwqLinear(AWQQuantizeLinear):
    """qweight uint32 [K, N/8], qzeros uint32 [K/G, N/8], scales [K/G, N] and an optional bias."""
