"""The command lines of mlc_llm's three steps."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcawq.build.via_mlc.interpreter import MlcInterpreter
from mlcawq.errors import Problem, UserError, raise_all

STEPS = ("gen_config", "convert_weight", "compile")
PLUGIN = Path(__file__).resolve().parents[1] / "mlc_plugin" / "__main__.py"
# Stands for the template's file in a command that is only shown, and the shell's name for it.
CONVERSATION = "CONVERSATION_FILE"
VARIABLE = '"$conversation"'
# What mlcawq decides itself: given twice, the two would contradict each other in silence.
_OWN = {
    "--output": "-o",
    "-o": "-o",
    "--quantization": "--quantization",
    "--conv-template": "--conv-template",
    "--weight-layout": "--weight-layout",
}
_OWN_OF = {"compile": {"--device": "--target"}}


def typed(argv: Sequence[str]) -> str:
    """A command line as one types it in a shell."""
    return shlex.join(argv).replace(CONVERSATION, VARIABLE)


@dataclass(frozen=True)
class Extra:
    """Arguments of mlc_llm's own that follow ours in each step."""

    gen_config: tuple[str, ...] = ()
    convert_weight: tuple[str, ...] = ()
    compile: tuple[str, ...] = ()

    def of(self, step: str) -> tuple[str, ...]:
        words: tuple[str, ...] = getattr(self, step)
        return words

    def names_model_type(self) -> bool:
        words = (word for step in STEPS for word in self.of(step))
        return any(word.startswith("--model-t") for word in words)


def parse_extra(gen_config: str = "", convert_weight: str = "", compile_: str = "") -> Extra:
    """Texts as they are given to --gen-config-args and its like. Raises UserError for quotes that
    do not close, and for options that mlcawq has itself.
    """
    problems: list[Problem] = []
    parts = []
    given = {"gen_config": gen_config, "convert_weight": convert_weight, "compile": compile_}
    for step, text in given.items():
        option = f"--{step.replace('_', '-')}-args"
        words: list[str] = []
        try:
            words = shlex.split(text)
            check_extra(step, words, option)
        except ValueError as error:
            problems.append(Problem(f"{text!r} cannot be split into words: {error}", option))
        except UserError as error:
            problems += error.problems
        parts.append(tuple(words))
    raise_all(problems)
    return Extra(*parts)


def check_extra(step: str, words: Sequence[str], where: str) -> None:
    """Raises UserError for options among `words` that mlcawq sets itself."""
    own = {**_OWN, **_OWN_OF.get(step, {})}
    raise_all(
        Problem(f"{word} is not passed on", where, f"mlcawq has {own[name]} for it")
        for word in words
        if (name := word.partition("=")[0]) in own
    )


def check_known(extra: Extra, interpreter: MlcInterpreter) -> None:
    """Raises UserError for options that the installed mlc_llm does not have.

    A step that comes late would otherwise refuse them after the long ones before it.
    """
    problems = []
    for step in STEPS:
        known = interpreter.options.get(step)
        for word in extra.of(step) if known else ():
            name = word.partition("=")[0]
            # argparse takes an option by any beginning that is its alone.
            if name.startswith("--") and not any(option.startswith(name) for option in known or ()):
                near = difflib.get_close_matches(name, sorted(known or ()), 1)
                problems.append(
                    Problem(
                        f"mlc_llm {interpreter.mlc_llm} has no option {name} for {step}",
                        "arguments for mlc_llm",
                        f"did you mean {near[0]}?" if near else f"it has {_listed(known or ())}",
                    )
                )
    raise_all(problems)


def _listed(options: Iterable[str]) -> str:
    return ", ".join(sorted(word for word in options if word.startswith("--") and word not in _OWN))


@dataclass(frozen=True)
class Program:
    """How mlc_llm is started: through our plug-in, or as it is.

    As it is means `python -m mlc_llm` where that can be imported; otherwise the plug-in's entry
    makes up for the compiled module that is missing, and adds nothing else.
    """

    interpreter: MlcInterpreter
    plugin: bool

    def words(self, step: str) -> list[str]:
        python = str(self.interpreter.python)
        if self.plugin:
            return [python, str(PLUGIN), step]
        if self.interpreter.imports:
            return [python, "-m", "mlc_llm", step]
        return [python, str(PLUGIN), "--stock", step]


def gen_config(
    program: Program,
    checkpoint: Path,
    out: str | Path,
    quantization: str,
    conv_template: str | Path,
    *,
    weight_layout: str | None = None,
    context_window_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """conv_template: a name, or the path of a file."""
    words = [*program.words("gen_config"), str(checkpoint), "--quantization", quantization]
    words += ["--conv-template", str(conv_template), *_layout(program, weight_layout)]
    sizes = {
        "--context-window-size": context_window_size,
        "--prefill-chunk-size": prefill_chunk_size,
        "--max-batch-size": max_batch_size,
    }
    for option, value in sizes.items():
        if value is not None:
            words += [option, str(value)]
    return [*words, "--output", str(out), *extra]


def convert_weight(
    program: Program,
    checkpoint: Path,
    out: str | Path,
    quantization: str,
    *,
    awq_source: Path | None = None,
    weight_layout: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """awq_source: the file that names the tensors of an AWQ checkpoint; None for a plain one.

    AWQ weights are only moved about, for which no GPU is needed; others are quantized on mlc_llm's
    choice of device.
    """
    words = [*program.words("convert_weight"), str(checkpoint), "--quantization", quantization]
    if awq_source is None:
        words += ["--source-format", "huggingface-safetensor"]
    else:
        words += ["--source-format", "awq", "--source", str(awq_source), "--device", "cpu"]
    words += _layout(program, weight_layout)
    return [*words, "--output", str(out), *extra]


def compile_(
    program: Program,
    model: str | Path,
    library: str | Path,
    device: str,
    *,
    extra: Sequence[str] = (),
) -> list[str]:
    """model: a folder with mlc-chat-config.json, or that file; device: as `targets` has it."""
    words = [*program.words("compile"), str(model), "--device", device]
    return [*words, "--output", str(library), *extra]


def _layout(program: Program, weight_layout: str | None) -> list[str]:
    """mlc_llm of itself has one layout and no option for it."""
    return ["--weight-layout", weight_layout] if program.plugin and weight_layout else []
