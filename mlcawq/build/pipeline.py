"""The three steps of a build, checked beforehand and put in place as one.

Everything that can be known from config.json, the headers of the weights and the machine is
checked first, and all offenders are named together. The folder is built beside its place and
renamed into it when the library has been verified.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.build.chat_config import (
    CONFIG_NAME,
    ChatConfig,
    library_name,
    planned_layout,
    planned_roundings,
    planned_tables,
    read_chat_config,
)
from mlcawq.build.checks import (
    Collector,
    disk_problems,
    memory_problems,
    overwriting_problems,
)
from mlcawq.build.compile import compile_model
from mlcawq.build.conversation_match import read_asked
from mlcawq.build.convert_weight import Conversion, convert_weight
from mlcawq.build.gen_config import GeneratedConfig, gen_config
from mlcawq.build.link import find_compiler, find_tools
from mlcawq.build.rounded_reference import table_bytes
from mlcawq.build.targets import resolve_target, target_device
from mlcawq.build.verify import (
    Mode,
    Verification,
    choose_mode,
    missing_device,
    num_parameters,
    verify_full,
    verify_sampled,
)
from mlcawq.build.vulkan_target import binding_problems, check_type
from mlcawq.build.weight_plan import has_own_head, plan_parameters
from mlcawq.checkpoint.config import ModelConfig, read_config
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import (
    check_folder,
    check_output,
    scratch_folder,
    staged_folder,
)
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.graph.roundings import EXACT, Roundings, check_roundings
from mlcawq.graph.settings import (
    CompileSettings,
    Quantization,
    check_dtype,
    check_layout,
    compile_settings,
    default_layout,
    infer_quantization,
    quantization_named,
)
from mlcawq.graph.tables import PLAIN, Tables, check_tables, choose_tables
from tir_kernels.layouts import BLOCKED

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target


@dataclass(frozen=True)
class BuildRequest:
    """What `mlcawq build` was asked for; None stands for the default.

    weight_layout: by default what the target's kernels are fastest with, in a whole build, and the
    stock one where a step has no target. head: one of `graph.tables.HEADS`, by default int8 where
    the weights lie as the CPU's kernels want them. activations, kv_cache_dtype: as of
    `graph.roundings.Roundings`, by default as good as float16. verify: True checks all layers
    whatever the size, False nothing, None by size.
    """

    target: str = "cpu"
    quantization: str | None = None
    weight_layout: str | None = None
    head: str | None = None
    activations: str | None = None
    kv_cache_dtype: str | None = None
    conv_template: str | None = None
    context_window_size: int | None = None
    prefill_chunk_size: int | None = None
    max_batch_size: int | None = None
    verify: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class BuildResult:
    """What was built. bits_per_parameter counts scales and zeros in; library: file name.

    unverified: why there is no verification, empty where there is one. via: the other project that
    built it, empty for ourselves. tables: how head and embedding are stored; roundings: what the
    library rounds beside the weights.
    """

    folder: Path
    quantization: str
    weight_layout: str | None
    parameters: int
    weight_bytes: int
    bits_per_parameter: float
    library: str
    library_bytes: int
    sizes: CompileSettings
    conv_template: str
    template_differences: int
    verification: Verification | None
    unverified: str
    via: str = ""
    tables: Tables = PLAIN
    roundings: Roundings = EXACT

    def as_json(self) -> dict[str, Any]:
        out = asdict(self)
        out["folder"] = str(self.folder)
        out["tables"] = self.tables.names()
        out |= out.pop("roundings")
        out["verification"] = self.verification.as_json() if self.verification else None
        return out


class Reporter:
    """Where progress goes. The base class is silent; the command line has one that prints."""

    def stage(self, text: str) -> None:
        """A step begins."""

    def message(self, text: str) -> None:
        """Something that the user should read."""

    def weights(self, name: str, done: int, total: int) -> None:
        """Bytes of weights written."""


@dataclass(frozen=True)
class Checked:
    """A build that may begin. unverified: why mode is "off"."""

    config: ModelConfig
    quantization: Quantization
    sizes: CompileSettings
    target: Target
    mode: Mode
    unverified: str


def build(
    checkpoint: Path, out: Path, request: BuildRequest, reporter: Reporter | None = None
) -> BuildResult:
    """Checkpoint folder -> model folder `out`, whole and verified, or not at all.

    Raises UserError for everything that is wrong beforehand, and when the library's logits are
    not the checkpoint's.
    """
    reporter = reporter or Reporter()
    checkpoint, out = Path(checkpoint), Path(out)
    checked = check(checkpoint, out, request)
    with staged_folder(out, overwrite=request.overwrite) as stage:
        reporter.stage("config and tokenizer")
        generated = gen_config(
            checkpoint,
            stage,
            checked.quantization.name,
            request.conv_template,
            weight_layout=checked.quantization.weight_layout,
            tables=checked.quantization.tables,
            roundings=checked.quantization.roundings,
            **asdict(checked.sizes),
        )
        for text in generated.messages:
            reporter.message(text)
        reporter.stage("weights")
        conversion = convert_weight(
            checkpoint, stage, checked.quantization.name, progress=reporter.weights
        )
        library = stage / library_name(target_device(checked.target))
        _compile(read_chat_config(stage), library, request.target, reporter)
        verification = _verify(stage, checkpoint, checked, reporter)
        return _result(out, checked, generated, conversion, library, verification)


def check(checkpoint: Path, out: Path, request: BuildRequest) -> Checked:
    """All that can be known before any work. Raises one UserError naming every problem."""
    problems: list[Problem] = []
    collect = Collector(problems)
    collect(lambda: check_output(out, overwrite=request.overwrite))
    problems += overwriting_problems(checkpoint, out, request.overwrite)
    target = collect(lambda: _target(request.target))
    if request.conv_template is not None:
        collect(lambda: read_asked(str(request.conv_template)))
    collect(lambda: require_tokenizer(checkpoint))
    config = collect(lambda: read_config(checkpoint))
    reader = collect(lambda: TensorReader(checkpoint))
    if config is None:
        raise UserError(*problems)
    own_head = reader is not None and has_own_head(config, reader)
    kind = collect(lambda: _quantization(config, request, target, own_head))
    sizes = collect(
        lambda: compile_settings(
            config,
            request.context_window_size,
            request.prefill_chunk_size,
            request.max_batch_size,
        )
    )
    mode = choose_mode(config, request.verify)
    unverified = "--no-verify" if mode == "off" else ""
    if target is not None and kind is not None and mode != "off":
        absent = missing_device(target, kind.name)
        if absent and request.verify:
            problems.append(Problem(f"the library cannot be verified: {absent}", "--verify", AWAY))
        elif absent:
            mode, unverified = "off", absent
    if kind is not None and reader is not None:
        plan = collect(lambda: plan_parameters(config, kind, reader))
        if plan and target is not None and target_device(target) == "vulkan":
            problems += binding_problems(target, plan)
        weights = sum(parameter.nbytes for parameter in plan or ())
        problems += disk_problems(out, weights)
        if mode != "off":
            on_cpu = target is not None and target_device(target) == "cpu"
            beside = table_bytes(config, kind.tables, kind.dtype)
            problems += memory_problems(config, beside + (weights if on_cpu else 0))
    raise_all(problems)
    assert kind is not None
    assert sizes is not None
    assert target is not None
    return Checked(config, kind, sizes, target, mode, unverified)


def _target(name: str) -> Target:
    """The target with all that compiling for it takes, or one UserError."""
    problems: list[Problem] = []
    collect = Collector(problems)
    target = collect(lambda: resolve_target(name))
    collect(find_compiler if target is None else lambda: find_tools(target))
    raise_all(problems)
    assert target is not None
    return target


def _quantization(
    config: ModelConfig, request: BuildRequest, target: Target | None, own_head: bool
) -> Quantization:
    """The quantization that is asked for, in the layout that is asked for or fits the target.

    own_head: whether the checkpoint's head is quantized already.
    """
    layout, device = request.weight_layout, None
    if target is not None:
        device = target_device(target)
        dtype = infer_quantization(config, request.quantization).dtype
        layout = layout or default_layout(device, dtype)
    kind = infer_quantization(config, request.quantization, layout)
    if request.weight_layout is not None and kind.weight_layout is None:
        raise UserError.one(
            f"{kind.name} has no packed weights that could lie as {request.weight_layout}",
            "--weight-layout",
            "leave it out; it is for AWQ checkpoints",
        )
    check_layout(kind.weight_layout, device)
    if device is not None:
        check_dtype(kind, device)
    check_type(request.target, kind.name)
    packed = kind.weight_layout == BLOCKED
    tables = choose_tables(config, request.head, packed=packed, own=own_head, device=device)
    roundings = EXACT.changed(request.activations, request.kv_cache_dtype)
    check_roundings(roundings, kind.weight_layout, device)
    return replace(kind, tables=tables, roundings=roundings)


def generate_config(checkpoint: Path, out: Path, request: BuildRequest) -> GeneratedConfig:
    """The step gen-config into a folder that may hold other parts of a build.

    A config that is there already keeps its weight layout, how head and embedding are stored and
    what is rounded beside the weights, unless the request names one. Files are put in place one by
    one when all of them are there, the config last.
    """
    out = Path(out).absolute()
    check_folder(out)
    if out.resolve() == Path(checkpoint).resolve():
        raise UserError.one("the output is the checkpoint", str(out), "choose another -o")
    layout = request.weight_layout or planned_layout(out)
    tables = planned_tables(out) if request.head is None else None
    if tables is None:
        tables = choose_tables(
            read_config(checkpoint),
            request.head,
            packed=layout == BLOCKED,
            own=_own_head(checkpoint),
            device=None,
        )
    roundings = planned_roundings(out).changed(request.activations, request.kv_cache_dtype)
    kind = infer_quantization(read_config(checkpoint), request.quantization, layout)
    check_roundings(roundings, kind.weight_layout, None)
    stage = scratch_folder(out.parent, f".{out.name}.partial-")
    try:
        generated = gen_config(
            checkpoint,
            stage,
            request.quantization,
            request.conv_template,
            weight_layout=layout,
            tables=tables,
            roundings=roundings,
            context_window_size=request.context_window_size,
            prefill_chunk_size=request.prefill_chunk_size,
            max_batch_size=request.max_batch_size,
        )
        out.mkdir(exist_ok=True)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return generated


def _own_head(checkpoint: Path) -> bool:
    """As `has_own_head`; False where the weights are not there to tell."""
    try:
        reader = TensorReader(checkpoint)
    except UserError:  # step convert-weight is the one that needs them
        return False
    return has_own_head(read_config(checkpoint), reader)


def compile_folder(
    path: Path, out: Path | None, target: str, reporter: Reporter | None = None
) -> Path:
    """The step compile: mlc-chat-config.json (or its folder) -> library; returns the library.

    out: the library's path, by default lib-<target>.so beside the config.
    Raises UserError when the config, the target or the machine does not allow it.
    """
    problems: list[Problem] = []
    collect = Collector(problems)
    config = collect(lambda: read_chat_config(path))
    resolved = collect(lambda: _target(target))
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if config is not None:
        collect(lambda: check_folder(out.parent if out is not None else folder))
    if config is not None and resolved is not None:
        device, kind = target_device(resolved), quantization_named(config.quantization)
        collect(lambda: check_layout(config.weight_layout, device))
        collect(lambda: check_tables(config.tables, device))
        collect(lambda: check_roundings(config.roundings, config.weight_layout, device))
        collect(lambda: check_dtype(kind, device))
        collect(lambda: check_type(target, config.quantization))
    raise_all(problems)
    assert config is not None
    assert resolved is not None
    library = out or folder / library_name(target_device(resolved))
    if library.is_dir():
        raise UserError.one("is a folder; a library is one file", str(library), "choose another -o")
    _compile(config, library, target, reporter or Reporter())
    return library


def _compile(config: ChatConfig, library: Path, target: str, reporter: Reporter) -> None:
    compile_model(
        config.model,
        library,
        target,
        config.quantization,
        **asdict(config.sizes),
        weight_layout=config.weight_layout,
        tables=config.tables,
        roundings=config.roundings,
        progress=lambda stage: reporter.stage(f"library: {stage}"),
    )


def _verify(
    stage: Path, checkpoint: Path, checked: Checked, reporter: Reporter
) -> Verification | None:
    if checked.mode == "off":
        return None
    reporter.stage("verification")
    device = target_device(checked.target)
    if checked.mode == "full":
        return verify_full(stage, checkpoint, device)
    return verify_sampled(
        stage,
        checkpoint,
        checked.target,
        lambda text: reporter.stage(f"verification: {text}"),
    )


def _result(
    out: Path,
    checked: Checked,
    generated: GeneratedConfig,
    conversion: Conversion,
    library: Path,
    verification: Verification | None,
) -> BuildResult:
    return BuildResult(
        folder=out,
        quantization=checked.quantization.name,
        weight_layout=checked.quantization.weight_layout,
        parameters=num_parameters(checked.config),
        weight_bytes=conversion.total_bytes,
        bits_per_parameter=conversion.bits_per_parameter,
        library=library.name,
        library_bytes=library.stat().st_size,
        sizes=checked.sizes,
        conv_template=str(generated.template.conversation.name),
        template_differences=len(generated.template.differences),
        verification=verification,
        unverified=checked.unverified,
        tables=checked.quantization.tables,
        roundings=checked.quantization.roundings,
    )


AWAY = (
    "leave --verify out and compare the logits on a machine that has one: "
    "`mlcawq eval OUT --against CHECKPOINT`"
)


__all__ = [
    "BuildRequest",
    "BuildResult",
    "Reporter",
    "build",
    "check",
    "compile_folder",
    "generate_config",
]
