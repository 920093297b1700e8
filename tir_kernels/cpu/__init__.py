"""Kernels for LLVM targets: vectors of the host's width, threads of TVM's pool, fp32 sums."""

from tir_kernels.cpu.attention_decode import attention_decode_paged
from tir_kernels.cpu.attention_prefill import attention_prefill_paged, attention_prefill_ragged
from tir_kernels.cpu.dense import dense_linear
from tir_kernels.cpu.elementwise import add_rms_norm, qk_norm, rms_norm, silu_multiply
from tir_kernels.cpu.expert_sums import expert_sums
from tir_kernels.cpu.experts import w4a16_experts_decode, w4a16_experts_grouped
from tir_kernels.cpu.logits import (
    apply_bitmask_inplace,
    apply_logit_bias_inplace,
    apply_penalty_inplace,
    softmax_with_temperature,
)
from tir_kernels.cpu.merge_state import merge_state
from tir_kernels.cpu.pages import append_to_pages, copy_page, move_slots, read_slots
from tir_kernels.cpu.rotary import split_rotary
from tir_kernels.cpu.rows import gather_rows, last_row, scatter_rows, take_rows
from tir_kernels.cpu.w4a16 import w4a16_linear

__all__ = [
    "add_rms_norm",
    "append_to_pages",
    "apply_bitmask_inplace",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "attention_decode_paged",
    "attention_prefill_paged",
    "attention_prefill_ragged",
    "copy_page",
    "dense_linear",
    "expert_sums",
    "gather_rows",
    "last_row",
    "merge_state",
    "move_slots",
    "qk_norm",
    "read_slots",
    "rms_norm",
    "scatter_rows",
    "silu_multiply",
    "softmax_with_temperature",
    "split_rotary",
    "take_rows",
    "w4a16_experts_decode",
    "w4a16_experts_grouped",
    "w4a16_linear",
]
