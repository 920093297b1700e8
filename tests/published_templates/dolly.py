"""Dolly v2: PROMPT_FOR_GENERATION_FORMAT in instruct_pipeline.py of databricks/dolly-v2-3b.

mlc_llm writes no blank line between the introduction and the instruction; the publisher does.
Dolly was trained on one instruction and one response, so only one question is documented.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

TOKENS = ModelTokens(
    {
        "<|endoftext|>": 0,
        "### End": 50277,
        "### Instruction:": 50278,
        "### Response:\n": 50279,
    },
    eos_ids=(0,),
)

PROMPT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
Name three rivers.

### Response:
"""

DOCUMENTED = [
    Documented(
        "dolly",
        "databricks/dolly-v2-3b",
        TOKENS,
        [([{"role": "user", "content": "Name three rivers."}], PROMPT)],
    )
]
