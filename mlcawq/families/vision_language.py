"""The text side of models that see: the decoder is that of a text model, under other names.

What looks at images stays as it is; only decoder blocks are quantized.
"""

from functools import partial

from mlcawq.families.base import Architecture
from mlcawq.families.gemma import SANDWICHED
from mlcawq.families.llama import LLAMA_GROUPS

_text_side = partial(
    Architecture,
    block="model.language_model.layers.{}",
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
)

TABLES = (
    _text_side(
        model_type="qwen2_vl",
        architectures=("Qwen2VLForConditionalGeneration",),
        groups=LLAMA_GROUPS,
    ),
    _text_side(
        model_type="qwen2_5_vl",
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        groups=LLAMA_GROUPS,
    ),
    _text_side(  # over vicuna, mistral or qwen2, whose blocks are alike
        model_type="llava",
        architectures=("LlavaForConditionalGeneration",),
        groups=LLAMA_GROUPS,
    ),
    _text_side(
        model_type="gemma3",
        architectures=("Gemma3ForConditionalGeneration",),
        groups=SANDWICHED,
    ),
)
