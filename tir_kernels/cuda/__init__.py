"""Kernels for NVIDIA GPUs from sm_75 on: tensor cores, fp32 sums."""

from tir_kernels.cuda.attention_prefill import attention_prefill_paged, attention_prefill_ragged
from tir_kernels.cuda.dense import dense_linear
from tir_kernels.cuda.experts import w4a16_experts_decode, w4a16_experts_grouped
from tir_kernels.cuda.w4a16 import w4a16_linear
from tir_kernels.gpu import (
    add_rms_norm,
    append_to_pages,
    apply_bitmask_inplace,
    apply_logit_bias_inplace,
    apply_penalty_inplace,
    attention_decode_paged,
    copy_page,
    last_row,
    merge_state,
    move_slots,
    qk_norm,
    read_slots,
    rms_norm,
    silu_multiply,
    softmax_with_temperature,
    split_rotary,
    take_rows,
)

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
    "last_row",
    "merge_state",
    "move_slots",
    "qk_norm",
    "read_slots",
    "rms_norm",
    "silu_multiply",
    "softmax_with_temperature",
    "split_rotary",
    "take_rows",
    "w4a16_experts_decode",
    "w4a16_experts_grouped",
    "w4a16_linear",
]
