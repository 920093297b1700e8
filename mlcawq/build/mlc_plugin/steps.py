"""mlc_llm's three commands with what we check before them and complete after them.

A command of mlc_llm is a module whose `main` parses arguments and calls one function with them.
Everything that it uses on the way is a global of that module, and is replaced there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlcawq.build.chat_config import CONFIG_NAME, agreed_layout, quantization_of
from mlcawq.build.mlc_plugin.agreement import check_model, fit, settle
from mlcawq.build.mlc_plugin.arguments import OurArguments, parser_class
from mlcawq.build.mlc_plugin.chat_config import complete
from mlcawq.build.mlc_plugin.checkpoint_view import CheckpointView, open_view
from mlcawq.checkpoint.config import load_json
from mlcawq.errors import UserError


def prepare(step: str, command: Any, until: ExitStack) -> None:
    """Make `command`, the module of a step, ours; `until` removes temporary files when closed."""
    given = OurArguments()
    command.ArgumentParser = parser_class(command.ArgumentParser, step, given)
    if step == "gen_config":
        _GenConfig(command, given, until)
    elif step == "convert_weight":
        _ConvertWeight(command, given, until)
    else:
        _Compile(command, given)


class _OnCheckpoint:
    """A command whose first argument is a checkpoint, which it is shown a view of."""

    def __init__(self, command: Any, given: OurArguments, until: ExitStack) -> None:
        self.given = given
        self.until = until
        self.view: CheckpointView | None = None
        self.detect: Callable[[str], Path] = command.detect_config
        command.detect_config = self.open_view

    def open_view(self, config: str) -> Path:
        from mlc_llm.model import MODEL_PRESETS

        try:
            found = self.detect(config)
        except ValueError as error:
            raise UserError.one(
                str(error), fix="give the folder of a Hugging Face checkpoint"
            ) from None
        if config in MODEL_PRESETS:  # no checkpoint: a config that mlc_llm brings along
            return found
        self.view = open_view(found, self.until)
        return self.view.config

    def settled(
        self, view: CheckpointView, model: Any, quantization: Any, layout: str | None
    ) -> Any:
        settled = settle(quantization, view.raw, view.where, layout)
        check_model(model, settled, view)
        return settled


class _GenConfig(_OnCheckpoint):
    def __init__(self, command: Any, given: OurArguments, until: ExitStack) -> None:
        super().__init__(command, given, until)
        self.original: Callable[..., None] = command.gen_config
        command.gen_config = self.run

    def run(self, **arguments: Any) -> None:
        view = self.view
        if view is None:
            if arguments["conv_template"] is None:
                raise UserError.one(
                    "a preset has no chat template to find one from",
                    "--conv-template",
                    "name a conversation template of mlc_llm",
                )
            self.original(**arguments)
            return
        model, out = arguments["model"], arguments["output"]
        quantization = self.settled(
            view, model, arguments["quantization"], self.given.weight_layout
        )
        # What renders chat templates, which the other steps do without.
        from mlcawq.build.mlc_plugin.conversation import choose_conversation

        conversation = choose_conversation(view.checkpoint, out, arguments["conv_template"])
        arguments |= {"quantization": quantization, "conv_template": conversation.name}
        self.original(**arguments)
        complete(out / CONFIG_NAME, view, quantization, conversation.template)


class _ConvertWeight(_OnCheckpoint):
    def __init__(self, command: Any, given: OurArguments, until: ExitStack) -> None:
        super().__init__(command, given, until)
        self.original: Callable[..., None] = command.convert_weight
        self.detect_weight: Callable[..., tuple[Path, str]] = command.detect_weight
        command.convert_weight = self.run
        command.detect_weight = self.find_weights

    def find_weights(self, path: Path, config: Path, source_format: str) -> tuple[Path, str]:
        view = self.view
        if view is None or not view.is_awq:
            found: tuple[Path, str] = self.detect_weight(path, config, source_format)
            return found
        if source_format not in ("auto", "awq"):
            raise UserError.one(
                f"--source-format {source_format} was asked for, but the checkpoint is AWQ",
                view.where,
                "leave --source-format out",
            )
        return (view.checkpoint if path == view.config.parent else path), "awq"

    def run(self, **arguments: Any) -> None:
        if self.view is not None:
            quantization, out = arguments["quantization"], arguments["output"]
            layout = self.given.weight_layout
            if quantization.kind == "awq":
                layout = agreed_layout(out, layout)
                _keep_float32()
            arguments["quantization"] = self.settled(
                self.view, arguments["model"], quantization, layout
            )
        self.original(**arguments)


class _Compile:
    def __init__(self, command: Any, given: OurArguments) -> None:
        self.given = given
        self.original: Callable[..., Any] = command.detect_quantization
        command.detect_quantization = self.quantization

    def quantization(self, asked: str | None, config: Path) -> Any:
        """What mlc-chat-config.json names, with the settings that it has of the checkpoint."""
        found = self.original(asked, config)
        if found.kind != "awq":
            return found
        raw = load_json(config)
        awq = quantization_of(str(raw.get("quantization") or found.name), raw.get("awq"))
        if awq is None:
            raise UserError.one(
                f"quantization {found.name} was asked for, but the folder is for "
                f"{raw['quantization']}",
                str(config),
                "leave --quantization out",
            )
        layout = agreed_layout(config.parent, self.given.weight_layout)
        return fit(found, awq, str(config), layout)


def _keep_float32() -> None:
    """Let mlc_llm store float32 as it is: it would cut scales and norms down to bfloat16."""
    from mlc_llm.interface import convert_weight

    stored = convert_weight.tvmjs.dump_tensor_cache

    def dump(*arguments: Any, **options: Any) -> None:
        stored(*arguments, **{**options, "encode_format": "raw"})

    convert_weight.tvmjs = SimpleNamespace(dump_tensor_cache=dump)
