"""The conversation template of a folder: chosen as a native build chooses it, handed to mlc_llm."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.conversation_template import ConvTemplateRegistry
from mlc_llm.protocol.conversation_protocol import Conversation as MlcConversation

from mlcawq.build.chat_template import find_chat_template
from mlcawq.build.conversation_match import choose
from mlcawq.build.conversation_presets import preset
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.build.tokenizer_files import copy_tokenizer
from mlcawq.engine.conversation import Conversation
from mlcawq.errors import UserError


@dataclass(frozen=True)
class Chosen:
    """name: what mlc_llm's registry calls it. template: None for one that only mlc_llm has."""

    name: str
    template: Conversation | None


def choose_conversation(checkpoint: Path, out: Path, asked: str | None) -> Chosen:
    """The template for a model, registered with mlc_llm under its name.

    asked: a shipped name, a JSON file or a name that only mlc_llm has; None to find it from the
    model's own chat template. The tokenizer is copied to `out`, whose tokens the template names.
    Raises UserError when nothing of that name is known, or no template can be derived.
    """
    theirs = ConvTemplateRegistry.get_conv_template(asked) if asked is not None else None
    if asked is not None and theirs is not None and preset(asked) is None:
        return Chosen(asked, None)
    if not _has_tokenizer(checkpoint):
        if theirs is not None and asked is not None:
            return Chosen(asked, None)
        raise UserError.one(
            "no tokenizer.json, tokenizer.model or vocab.json to find its tokens in",
            str(checkpoint),
            "name a conversation template of mlc_llm with --conv-template",
        )
    copy_tokenizer(checkpoint, out)
    tokens = ModelTokens.read(out, checkpoint)
    choice = choose(find_chat_template(checkpoint), tokens, asked)
    if asked is None or preset(asked) is not None:  # whoever wrote a file knows what is in it
        sys.stderr.writelines(f"{line}\n" for line in choice.report())
    template = choice.conversation
    registered = MlcConversation.from_json_dict(template.to_dict())
    ConvTemplateRegistry.register_conv_template(registered, override=True)
    return Chosen(str(template.name), template)


def _has_tokenizer(checkpoint: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return any((checkpoint / name).is_file() for name in names)
