"""The conversation templates that are shipped, the names they answer to, and their token ids.

templates/conversation holds one file for one way to render a dialogue. mlc_llm has names of its
own for the same thing, several where only token ids differ: each of them is accepted here, so that
a command line written for mlc_llm goes on to work. Token ids are taken from the model (`bind`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from mlcawq.checkpoint.config import load_json
from mlcawq.engine.conversation import Conversation
from mlcawq.resources import templates_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlcawq.build.model_tokens import ModelTokens

PLAIN = "LM"

# Another name of a shipped template -> the file that renders the same. Names of mlc_llm that end
# here on a file without a default system message follow the model's publisher: mlc_llm gives some
# of them one that the model's own chat template does not have.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "codellama_completion": "LM",
        "codellama_instruct": "llama-2",
        "deepseek_r1_llama": "deepseek-r1",
        "deepseek_r1_qwen": "deepseek-r1",
        "deepseek_v2": "deepseek",
        "gemma": "gemma_instruction",
        "gpt2": "LM",
        "gpt_bigcode": "LM",
        "llama_default": "llama-2",
        "mistral_default": "mistral-v0.2",
        "neural_hermes_mistral": "chatml",
        "open_hermes_mistral": "chatml",
        "phi-3-vision": "phi-3",
        "qwen3_5": "qwen3-thinking",
        "stablelm-2": "stablelm-3b",
        "tinyllama_v1_0": "zephyr",
    }
)


@lru_cache(maxsize=1)
def presets() -> Mapping[str, Conversation]:
    """The shipped templates by the name of their file; no two render alike."""
    return MappingProxyType(
        {
            path.stem: Conversation.from_dict(load_json(path), str(path))
            for path in sorted(templates_dir("conversation").glob("*.json"))
        }
    )


def preset(name: str) -> Conversation | None:
    """The shipped template called `name`, by its file or another name of it; None if unknown."""
    return presets().get(ALIASES.get(name, name))


def preset_names() -> list[str]:
    """Every name that `preset` knows, sorted."""
    return sorted({*presets(), *ALIASES}, key=str.lower)


def bind(conversation: Conversation, tokens: ModelTokens) -> Conversation:
    """`conversation` with this model's token ids.

    A shipped template names tokens by their text. Stop strings that are tokens become stop ids,
    beside the model's own ends of text. One prefix id stands for bos, and becomes this model's (or
    nothing, where it has none); more than one are the tokens of one family ([gMASK] sop), and stay
    where they are control tokens of this model. A template that adds no text opens as the model's
    tokenizer opens any text.
    """
    ids = [*tokens.eos_ids, *(tokens.id_of(text) for text in conversation.stop_str)]
    return replace(
        conversation,
        stop_token_ids=tuple(dict.fromkeys(i for i in ids if i is not None)),
        system_prefix_token_ids=_prefix(conversation, tokens),
    )


def _prefix(conversation: Conversation, tokens: ModelTokens) -> tuple[int, ...] | None:
    given = conversation.system_prefix_token_ids
    if given is not None and len(given) > 1 and {*given} <= {*tokens.added.values()}:
        return tuple(given)
    wanted = tokens.opens_with_bos if conversation.is_plain else given is not None
    bos = tokens.id_of(tokens.bos)
    return (bos,) if wanted and bos is not None else None
