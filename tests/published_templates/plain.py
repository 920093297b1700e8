"""Models that continue a text: they have no chat template, and their prompt is the text itself."""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

_PROMPTS = [([{"role": "user", "content": "Once upon a time"}], "Once upon a time")]

DOCUMENTED = [
    Documented(
        "LM",
        "openai-community/gpt2",
        ModelTokens({"<|endoftext|>": 50256}, bos="<|endoftext|>", eos_ids=(50256,)),
        _PROMPTS,
    ),
    Documented(
        "LM",
        "bigcode/gpt_bigcode-santacoder",
        ModelTokens({"<|endoftext|>": 49152}, bos="<|endoftext|>", eos_ids=(49152,)),
        _PROMPTS,
    ),
    Documented(
        "LM",
        "codellama/CodeLlama-7b-hf",
        ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True),
        _PROMPTS,
    ),
]
