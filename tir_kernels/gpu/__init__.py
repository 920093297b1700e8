"""Kernels that CUDA and Vulkan share: thread blocks and shared memory, nothing of one vendor.

They hold for WGSL's limits and need no subgroups (`blocks`). Sums are fp32.
"""

from tir_kernels.gpu.activation import silu_multiply
from tir_kernels.gpu.attention_decode import attention_decode_paged
from tir_kernels.gpu.attention_prefill import attention_prefill_paged, attention_prefill_ragged
from tir_kernels.gpu.expert_sums import expert_sums
from tir_kernels.gpu.logits import (
    apply_bitmask_inplace,
    apply_logit_bias_inplace,
    apply_penalty_inplace,
    softmax_with_temperature,
)
from tir_kernels.gpu.merge_state import merge_state
from tir_kernels.gpu.norms import add_rms_norm, qk_norm, rms_norm
from tir_kernels.gpu.pages import append_to_pages, copy_page, move_slots, read_slots
from tir_kernels.gpu.rotary import split_rotary
from tir_kernels.gpu.rows import gather_rows, last_row, scatter_rows, take_rows
from tir_kernels.gpu.sampling import (
    multinomial_from_uniform,
    renormalize_by_top_p,
    sample_with_top_p,
    sampler_take_probs,
)
from tir_kernels.gpu.sorting import argsort_probs

__all__ = [
    "add_rms_norm",
    "append_to_pages",
    "apply_bitmask_inplace",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "argsort_probs",
    "attention_decode_paged",
    "attention_prefill_paged",
    "attention_prefill_ragged",
    "copy_page",
    "expert_sums",
    "gather_rows",
    "last_row",
    "merge_state",
    "move_slots",
    "multinomial_from_uniform",
    "qk_norm",
    "read_slots",
    "renormalize_by_top_p",
    "rms_norm",
    "sample_with_top_p",
    "sampler_take_probs",
    "scatter_rows",
    "silu_multiply",
    "softmax_with_temperature",
    "split_rotary",
    "take_rows",
]
