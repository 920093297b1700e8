"""Falcon in its three forms: two norms side by side (40B, 180B), one for both (7B, 11B), and one
after the other (RW).
"""

from mlcawq.families.base import Architecture, ScalingGroup

_QKV, _DENSE = "self_attention.query_key_value", "self_attention.dense"
_UP, _DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
_VALUES = ScalingGroup(_QKV, (_DENSE,), _DENSE, rows="v_grouped")
_INNER = ScalingGroup(None, (_DOWN,), _DOWN)

TABLES = (
    Architecture(
        model_type="falcon",
        architectures=("FalconForCausalLM",),
        groups=(
            ScalingGroup("ln_attn", (_QKV,), "self_attention"),
            _VALUES,
            ScalingGroup("ln_mlp", (_UP,), "mlp"),
            _INNER,
        ),
        layouts=(
            (
                ScalingGroup("input_layernorm", (_QKV,), "self_attention"),
                _VALUES,
                ScalingGroup("post_attention_layernorm", (_UP,), "mlp"),
                _INNER,
            ),
            (
                ScalingGroup("input_layernorm", (_QKV, _UP), "self_attention", beside=("mlp",)),
                _VALUES,
                _INNER,
            ),
        ),
        block="transformer.h.{}",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
    ),
)
