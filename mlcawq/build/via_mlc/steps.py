"""Each of mlc_llm's three steps alone, into a folder that may hold other parts of a build.

A step writes beside the folder; what it wrote is moved in when it has ended well.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlcawq.build.chat_config import CONFIG_NAME, config_path, planned_layout, planned_tables
from mlcawq.build.checks import Collector, disk_problems
from mlcawq.build.pipeline import Reporter
from mlcawq.build.via_mlc import checkpoint as checkpoints
from mlcawq.build.via_mlc import commands, targets
from mlcawq.build.via_mlc.checkpoint import MlcCheckpoint
from mlcawq.build.via_mlc.commands import Program
from mlcawq.build.via_mlc.interpreter import find_mlc
from mlcawq.build.via_mlc.pipeline import TENSOR_CACHES, require_result, without_litter
from mlcawq.build.via_mlc.plan import MlcRequest, layout_of, notes, sizes_of, window_arguments
from mlcawq.build.via_mlc.run import run_step
from mlcawq.build.via_mlc.template import MlcTemplate, choose_template
from mlcawq.checkpoint.config import load_json
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.checkpoint.writing import check_folder, scratch_folder
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.graph.settings import check_layout, check_mlc_layout
from tir_kernels.layouts import AUTOAWQ


@dataclass(frozen=True)
class Step:
    """A step that may begin.

    out: the folder that it adds to. library: the file that it writes there, where it is `compile`.
    command: (folder for the results, file of the template) -> its command line.
    """

    name: str
    out: Path
    command: Callable[[Path, str], list[str]]
    notes: tuple[str, ...]
    checkpoint: Path | None = None
    template: MlcTemplate | None = None
    library: str = ""

    def by_hand(self) -> str:
        return commands.typed(self.command(self.out.absolute(), commands.CONVERSATION))

    def typed(self) -> list[str]:
        """The lines to type for the same result."""
        folder = commands.typed([str(self.out.absolute())])
        line = [self.by_hand()]
        return [f"mkdir -p {folder}", *(self.template.typed(line) if self.template else line)]

    def run(self, reporter: Reporter | None = None, output: IO[bytes] | None = None) -> Path:
        """Take the step; returns the file that names its results. Raises UserError as `run_step`.

        An earlier result of the same step is replaced, and stays where the step fails.
        """
        reporter = reporter or Reporter()
        for note in self.notes:
            reporter.message(note)
        reporter.stage(f"mlc_llm {self.name}")
        out = self.out.absolute()
        beside = out if out.is_dir() else out.parent
        stage = scratch_folder(beside, f".{out.name}.partial-")
        try:
            conversation = self.template.file() if self.template else nullcontext("")
            with conversation as file, without_litter(self.checkpoint):
                run_step(self.command(stage, str(file)), self.by_hand(), output)
            require_result(self.name, stage, stage / self.library, self.by_hand())
            out.mkdir(exist_ok=True)
            return _publish(self.name, stage, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _publish(step: str, stage: Path, out: Path) -> Path:
    """Move results in, the file that names the others last: whoever finds it finds them."""
    names = {CONFIG_NAME, *TENSOR_CACHES}
    if step == "convert_weight":
        for old in (*(out / name for name in TENSOR_CACHES), *out.glob("params_shard_*.bin")):
            old.unlink(missing_ok=True)
    moved = sorted(stage.iterdir(), key=lambda file: (file.name in names, file.name))
    for file in moved:
        os.replace(file, out / file.name)
    return out / moved[-1].name


def gen_config(checkpoint: Path, out: Path, request: MlcRequest) -> Step:
    """mlc-chat-config.json and the tokenizer. Raises UserError naming every problem.

    A config that is there already keeps its weight layout unless the request names one.
    """
    asked, plugin = request.build, request.plugin
    problems: list[Problem] = []
    collect = Collector(problems)
    collect(lambda: _check_out(checkpoint, out))
    collect(lambda: require_tokenizer(checkpoint))
    program, described = _opened(checkpoint, request, problems)
    name = collect(
        lambda: checkpoints.choose_quantization(
            described, asked.quantization, program.interpreter, plugin=plugin
        )
    )
    sizes = collect(lambda: sizes_of(described, asked))
    template = collect(
        lambda: choose_template(checkpoint, asked.conv_template, program.interpreter, plugin=plugin)
    )
    layout = collect(lambda: layout_of(asked, described, None, plugin=plugin))
    if asked.weight_layout is None and described.awq is not None:
        layout = collect(lambda: planned_layout(out)) or layout
    collect(lambda: _check_stock_layout(layout, plugin=plugin))
    raise_all(problems)
    assert name is not None
    assert sizes is not None
    assert template is not None
    quantization, known_sizes = name, sizes

    def command(folder: Path, conversation: str) -> list[str]:
        return commands.gen_config(
            program,
            described.folder,
            folder,
            quantization,
            template.name or conversation,
            weight_layout=layout,
            **known_sizes,
            extra=(*window_arguments(described, program), *request.extra.gen_config),
        )

    told = (*notes(program), *template.report())
    return Step("gen_config", out, command, told, checkpoint, template)


def convert_weight(checkpoint: Path, out: Path, request: MlcRequest) -> Step:
    """tensor-cache.json and params_shard_*.bin. Raises UserError naming every problem."""
    asked, plugin = request.build, request.plugin
    problems: list[Problem] = []
    collect = Collector(problems)
    collect(lambda: _check_out(checkpoint, out))
    program, described = _opened(checkpoint, request, problems)
    collect(lambda: checkpoints.check_sources(described))
    name = collect(
        lambda: checkpoints.choose_quantization(
            described, asked.quantization, program.interpreter, plugin=plugin
        )
    )
    layout = collect(lambda: layout_of(asked, described, None, plugin=plugin))
    planned = collect(lambda: planned_layout(out)) if described.awq is not None else None
    if asked.weight_layout is None and planned is not None:
        layout = planned
    elif planned is not None and planned != layout:
        what = f"{asked.weight_layout} was asked for, but {CONFIG_NAME} there says {planned}"
        fix = "leave --weight-layout out, or run gen-config with it first"
        problems.append(Problem(what, str(out), fix))
    collect(lambda: _check_stock_layout(layout, plugin=plugin))
    weights = collect(lambda: checkpoints.weight_bytes(described, name)) if name else None
    problems += disk_problems(out, weights or 0)
    raise_all(problems)
    assert name is not None
    quantization = name
    awq = described.weights if described.awq is not None else None

    def command(folder: Path, _conversation: str) -> list[str]:
        return commands.convert_weight(
            program,
            described.folder,
            folder,
            quantization,
            awq_source=awq,
            weight_layout=layout,
            extra=request.extra.convert_weight,
        )

    return Step("convert_weight", out, command, tuple(notes(program)), checkpoint)


def compile_(model: Path, library: Path | None, request: MlcRequest) -> Step:
    """The library. model: a folder with mlc-chat-config.json, or that file; library: its path, by
    default lib-<target>.so beside the config. Raises UserError naming every problem.
    """
    problems: list[Problem] = []
    collect = Collector(problems)
    config = collect(lambda: config_path(model))
    interpreter = collect(lambda: find_mlc(request.python, plugin=request.plugin))
    target = collect(
        lambda: targets.resolve(request.build.target, interpreter, plugin=request.plugin)
    )
    if interpreter is not None:
        collect(lambda: commands.check_known(request.extra, interpreter))
    if interpreter is not None and target is not None:
        collect(lambda: targets.check_compilers(target, interpreter, plugin=request.plugin))
    if config is not None and target is not None:
        layout = collect(lambda: load_json(config).get("weight_layout"))
        collect(lambda: check_layout(layout, target.kind or None))
        collect(lambda: _check_stock_layout(layout, plugin=request.plugin))
        collect(lambda: _check_plain_head(config.parent))
    raise_all(problems)
    assert config is not None
    assert interpreter is not None
    assert target is not None
    path = (library or config.parent / target.library).absolute()
    if path.is_dir():
        raise UserError.one("is a folder; a library is one file", str(path), "choose another -o")
    check_folder(path.parent)
    program, device = Program(interpreter, request.plugin), target.device

    def command(folder: Path, _conversation: str) -> list[str]:
        return commands.compile_(
            program,
            config.absolute(),
            folder / path.name,
            device,
            extra=request.extra.compile,
        )

    return Step("compile", path.parent, command, tuple(notes(program)), library=path.name)


def _opened(
    checkpoint: Path, request: MlcRequest, problems: list[Problem]
) -> tuple[Program, MlcCheckpoint]:
    """The program and the checkpoint that all other checks need. Raises what was found so far
    where one of them lacks.
    """
    collect = Collector(problems)
    interpreter = collect(lambda: find_mlc(request.python, plugin=request.plugin))
    described = collect(lambda: checkpoints.describe(checkpoint.absolute()))
    if interpreter is None or described is None:
        raise UserError(*problems)
    collect(lambda: commands.check_known(request.extra, interpreter))
    collect(
        lambda: checkpoints.check_family(
            described,
            interpreter,
            plugin=request.plugin,
            renamed=request.extra.names_model_type(),
        )
    )
    return Program(interpreter, request.plugin), described


def _check_stock_layout(layout: str | None, *, plugin: bool) -> None:
    check_mlc_layout(layout)
    if not plugin and layout not in (None, AUTOAWQ):
        raise UserError.one(
            f"the folder's weights are planned in the layout {layout}, which mlc_llm of itself "
            "does not know",
            "--no-plugin",
            "leave it out, or choose another -o",
        )


def _check_plain_head(folder: Path) -> None:
    tables = planned_tables(folder)
    if tables is not None and tables.names():
        raise UserError.one(
            f"the folder's output head is planned as {', '.join(tables.names().values())}, and "
            "mlc_llm computes with a plain one",
            str(folder),
            "build without --via mlc-llm, or with --head float16",
        )


def _check_out(checkpoint: Path, out: Path) -> None:
    _check_plain_head(out)
    check_folder(out)
    if out.resolve() == checkpoint.resolve():
        raise UserError.one("the output is the checkpoint", str(out), "choose another -o")
