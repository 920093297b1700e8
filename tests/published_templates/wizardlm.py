"""WizardLM, WizardCoder and WizardMath: the READMEs of nlpxucan/WizardLM.

All describe a single question. A second one follows the answer's end: the end-of-text token that
answers were trained with (WizardLM/src/train_freeform.py), or, where it has not the same text in
every model of the format, an empty line.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)

_QUESTION = "Write a Python code to count 1 to 10."
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n" + _QUESTION + "\n\n### Response:"
)

DOCUMENTED = [
    Documented(
        "wizardlm_7b",
        "WizardLM/WizardLM-7B-V1.0",
        TOKENS,
        [([user(_QUESTION)], _QUESTION + "\n\n### Response:")],
    ),
    Documented(
        "wizard_coder_or_math",
        "WizardLM/WizardCoder-Python-34B-V1.0",
        TOKENS,
        [([user(_QUESTION)], _INSTRUCTION)],
    ),
    Documented(
        "wizard_coder_or_math",
        "WizardLM/WizardMath-7B-V1.0",
        TOKENS,
        [([user(_QUESTION)], _INSTRUCTION)],
    ),
]
