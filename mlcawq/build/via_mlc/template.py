"""The conversation template as mlc_llm's gen_config is given it.

The choice is that of a native build. The plug-in takes the whole template as a file, with this
model's token ids; mlc_llm itself knows names only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlcawq.build.chat_config import CONFIG_NAME
from mlcawq.build.chat_template import find_chat_template
from mlcawq.build.conversation_match import TemplateChoice, choose, compare
from mlcawq.build.conversation_presets import preset
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.build.tokenizer_files import copy_tokenizer
from mlcawq.build.via_mlc.commands import VARIABLE
from mlcawq.build.via_mlc.interpreter import MlcInterpreter
from mlcawq.checkpoint.config import load_json
from mlcawq.engine.conversation import Conversation
from mlcawq.errors import UserError

PLAIN = "LM"  # mlc_llm's name, and ours, of a template that adds nothing


@dataclass(frozen=True)
class MlcTemplate:
    """name: one of mlc_llm's own, to be given as it is; None where `choice` is given as a file.

    choice: what a native build would take; None for a name that only mlc_llm has.
    """

    name: str | None
    choice: TemplateChoice | None

    def written(self, checkpoint: Path, folder: Path) -> TemplateChoice | None:
        """What `folder` has of it after gen_config, None where that is no template.

        mlc_llm's template of a name may render otherwise than ours of that name does.
        """
        content = load_json(folder / CONFIG_NAME).get("conv_template")
        if not isinstance(content, dict):
            return None
        conversation = Conversation.from_dict(content, str(folder / CONFIG_NAME))
        template = find_chat_template(checkpoint)
        if template is None:
            return TemplateChoice(conversation, "given")
        tokens = ModelTokens.read(folder, checkpoint)
        return TemplateChoice(conversation, "given", tuple(compare(conversation, template, tokens)))

    def text(self) -> str:
        """The template in MLC's schema, as JSON. Only where it is given as a file."""
        if self.choice is None:
            raise ValueError("a template that is given by its name has no text")
        content = self.choice.conversation.to_dict()
        return json.dumps(content, indent=2, ensure_ascii=False)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """A file with `text`, for as long as a step may read it; no file where there is a name."""
        with tempfile.TemporaryDirectory(prefix="mlcawq-conversation-") as folder:
            path = Path(folder) / "conversation.json"
            if self.name is None:
                path.write_text(self.text(), encoding="utf-8")
            yield path

    def typed(self, lines: Sequence[str]) -> list[str]:
        """Shell commands that need the template, between those that make its file and remove it."""
        if self.name is not None:
            return list(lines)
        opening = ["conversation=$(mktemp)", f"cat > {VARIABLE} <<'JSON'", self.text(), "JSON"]
        return [*opening, *lines, f"rm {VARIABLE}"]

    def report(self) -> list[str]:
        """What a user should read about it."""
        if self.choice is not None:
            return self.choice.report()
        return [f"conversation template: {self.name} of mlc_llm, as asked"]


def choose_template(
    checkpoint: Path, asked: str | None, interpreter: MlcInterpreter, *, plugin: bool
) -> MlcTemplate:
    """asked: --conv-template; None to find it from the model's own chat template.

    Raises UserError where `asked` is nobody's, and, without the plug-in, where mlc_llm has no name
    for what was found.
    """
    theirs = interpreter.conv_templates or frozenset()
    if asked is not None and asked in theirs and (not plugin or preset(asked) is None):
        return MlcTemplate(asked, None)
    if asked is not None and not plugin:
        raise _nameless(f"mlc_llm has no conversation template {asked!r}", theirs)
    with tempfile.TemporaryDirectory(prefix="mlcawq-tokenizer-") as scratch:
        copy_tokenizer(checkpoint, Path(scratch))
        tokens = ModelTokens.read(Path(scratch), checkpoint)
    choice = choose(find_chat_template(checkpoint), tokens, asked)
    if plugin:
        return MlcTemplate(None, choice)
    name = choice.conversation.name
    if choice.origin == "derived" or name is None or name not in theirs:
        raise _nameless("mlc_llm has no conversation template for this model's own", theirs)
    return MlcTemplate(name, choice)


def _nameless(what: str, theirs: frozenset[str]) -> UserError:
    names = f" ({', '.join(sorted(theirs, key=str.lower))})" if theirs else ""
    return UserError.one(
        what,
        "--conv-template",
        f"choose one with --conv-template{names}, or leave --no-plugin out: the plug-in takes any",
    )
