"""What a build through mlc_llm will run, after everything was checked that can be known before."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlcawq.build.checks import (
    Collector,
    disk_problems,
    memory_problems,
    overwriting_problems,
)
from mlcawq.build.pipeline import AWAY, BuildRequest
from mlcawq.build.verify import Mode, choose_mode, missing_device
from mlcawq.build.via_mlc import checkpoint as checkpoints
from mlcawq.build.via_mlc import commands, targets, template
from mlcawq.build.via_mlc.checkpoint import MlcCheckpoint
from mlcawq.build.via_mlc.commands import Extra, Program
from mlcawq.build.via_mlc.interpreter import find_mlc
from mlcawq.build.via_mlc.targets import MlcTarget
from mlcawq.build.via_mlc.template import MlcTemplate
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.checkpoint.writing import check_output
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.graph.roundings import EXACT
from mlcawq.graph.settings import (
    QUANTIZATIONS,
    check_layout,
    check_mlc_layout,
    compile_settings,
    default_layout,
)
from tir_kernels.layouts import AUTOAWQ

_BATCH = 4  # sequences decoded at once, as in a native build


@dataclass(frozen=True)
class MlcRequest:
    """What `mlcawq build --via mlc-llm` was asked for, beside what every build is.

    python: the interpreter that has mlc_llm, None to look for it. plugin: whether our plug-in runs
    in it. extra: arguments of mlc_llm's own.
    """

    build: BuildRequest = field(default_factory=BuildRequest)
    python: Path | None = None
    plugin: bool = True
    extra: Extra = field(default_factory=Extra)


@dataclass(frozen=True)
class Plan:
    """A build that may begin. sizes: the arguments that are passed on, None for mlc_llm's own
    defaults. unverified: why mode is "off". notes: lines for the user.
    """

    program: Program
    checkpoint: MlcCheckpoint
    target: MlcTarget
    quantization: str
    weight_layout: str | None
    template: MlcTemplate
    sizes: dict[str, int | None]
    extra: Extra
    mode: Mode
    unverified: str
    notes: tuple[str, ...]

    def steps(self, folder: Path, conversation: str | Path) -> dict[str, list[str]]:
        """The command line of every step. conversation: the template's file, where it is one."""
        folder = folder.absolute()
        awq = self.checkpoint.weights if self.checkpoint.awq is not None else None
        return {
            "gen_config": commands.gen_config(
                self.program,
                self.checkpoint.folder,
                folder,
                self.quantization,
                self.template.name or conversation,
                weight_layout=self.weight_layout,
                **self.sizes,
                extra=(*window_arguments(self.checkpoint, self.program), *self.extra.gen_config),
            ),
            "convert_weight": commands.convert_weight(
                self.program,
                self.checkpoint.folder,
                folder,
                self.quantization,
                awq_source=awq,
                weight_layout=self.weight_layout,
                extra=self.extra.convert_weight,
            ),
            "compile": commands.compile_(
                self.program,
                folder,
                folder / self.target.library,
                self.target.device,
                extra=self.extra.compile,
            ),
        }

    def by_hand(self, out: Path) -> dict[str, str]:
        """The steps as one types them, with results in `out`."""
        steps = self.steps(out, commands.CONVERSATION)
        return {step: commands.typed(argv) for step, argv in steps.items()}


def check(checkpoint: Path, out: Path, request: MlcRequest) -> Plan:
    """All that can be known before any work. Raises one UserError naming every problem."""
    asked, plugin = request.build, request.plugin
    problems: list[Problem] = []
    collect = Collector(problems)
    collect(lambda: check_output(out, overwrite=asked.overwrite))
    problems += overwriting_problems(checkpoint, out, asked.overwrite)
    interpreter = collect(lambda: find_mlc(request.python, plugin=plugin))
    target = collect(lambda: targets.resolve(asked.target, interpreter, plugin=plugin))
    collect(lambda: require_tokenizer(checkpoint))
    described = collect(lambda: checkpoints.describe(checkpoint.absolute()))
    if described is None or interpreter is None:
        raise UserError(*problems)
    collect(lambda: commands.check_known(request.extra, interpreter))
    if target is not None:
        collect(lambda: targets.check_compilers(target, interpreter, plugin=plugin))
    collect(lambda: checkpoints.check_sources(described))
    collect(
        lambda: checkpoints.check_family(
            described, interpreter, plugin=plugin, renamed=request.extra.names_model_type()
        )
    )
    name = collect(
        lambda: checkpoints.choose_quantization(
            described, asked.quantization, interpreter, plugin=plugin
        )
    )
    layout = collect(lambda: layout_of(asked, described, target, plugin=plugin))
    sizes = collect(lambda: sizes_of(described, asked))
    chosen = collect(
        lambda: template.choose_template(
            checkpoint, asked.conv_template, interpreter, plugin=plugin
        )
    )
    mode, unverified = _verification(described, target, name, asked, problems)
    weights = collect(lambda: checkpoints.weight_bytes(described, name)) if name else None
    problems += disk_problems(out, weights or 0)
    if mode != "off" and described.config is not None:
        on_cpu = target is not None and target.kind == "cpu"
        problems += memory_problems(described.config, weights or 0 if on_cpu else 0)
    raise_all(problems)
    assert target is not None
    assert name is not None
    assert sizes is not None
    assert chosen is not None
    program = Program(interpreter, plugin)
    return Plan(
        program,
        described,
        target,
        name,
        layout,
        chosen,
        sizes,
        request.extra,
        mode,
        unverified,
        (*notes(program), *chosen.report()),
    )


def dry_run(plan: Plan, out: Path, *, overwrite: bool = False) -> list[str]:
    """The lines to type for the same result as `build`, verification apart."""
    place = commands.typed([str(out.absolute())])
    removal = [f"rm -r {place}"] if overwrite and out.exists() else []
    steps = list(plan.by_hand(out).values())
    return [*removal, f"mkdir -p {place}", *plan.template.typed(steps)]


def layout_of(
    asked: BuildRequest, checkpoint: MlcCheckpoint, target: MlcTarget | None, *, plugin: bool
) -> str | None:
    """The layout of AWQ weights: what is asked for, or what the target's kernels like best."""
    wanted = asked.weight_layout
    if asked.head not in (None, "float16"):
        raise UserError.one(
            f"mlc_llm computes with a plain output head, and {asked.head} was asked for",
            "--head",
            "leave it out, or build without --via mlc-llm",
        )
    for name, value in EXACT.changed(asked.activations, asked.kv_cache_dtype).names().items():
        raise UserError.one(
            f"mlc_llm has no {name} of {value}",
            f"--{name.replace('_', '-')}",
            "leave it out, or build without --via mlc-llm",
        )
    if wanted is not None and (checkpoint.awq is None or (not plugin and wanted != AUTOAWQ)):
        what = (
            "the weights are not packed by AWQ"
            if checkpoint.awq is None
            else f"mlc_llm knows no layout {wanted} without the plug-in"
        )
        raise UserError.one(what, "--weight-layout", "leave it out")
    if checkpoint.awq is None:
        return None
    kind = target.kind if target is not None else ""
    if wanted is None and plugin and kind:
        # In mlc_llm's graphs the CPU's linears read the stock layout.
        wanted = AUTOAWQ if kind == "cpu" else default_layout(kind)
    check_layout(wanted, kind or None)
    check_mlc_layout(wanted)
    return wanted or AUTOAWQ


def sizes_of(checkpoint: MlcCheckpoint, asked: BuildRequest) -> dict[str, int | None]:
    """What a native build would compile for; of families that we do not know, what is asked."""
    given = (asked.context_window_size, asked.prefill_chunk_size, asked.max_batch_size)
    if checkpoint.config is not None:
        return dict(asdict(compile_settings(checkpoint.config, *given)))
    names = ("context_window_size", "prefill_chunk_size", "max_batch_size")
    raise_all(
        Problem(f"{name} must be positive, found {value}")
        for name, value in zip(names, given, strict=True)
        if value is not None and value <= 0
    )
    return dict(zip(names, (*given[:2], given[2] or _BATCH), strict=True))


def window_arguments(checkpoint: MlcCheckpoint, program: Program) -> tuple[str, ...]:
    """For mistral, whose cache mlc_llm would let roll over a window that the context never
    outgrows: `sizes_of` keeps it as short as the window, where the result is the same.
    """
    config = checkpoint.config
    rolls = config is not None and config.model_type == "mistral" and config.sliding_window
    return ("--sliding-window-size", "-1") if rolls and program.plugin else ()


def _verification(
    checkpoint: MlcCheckpoint,
    target: MlcTarget | None,
    quantization: str | None,
    asked: BuildRequest,
    problems: list[Problem],
) -> tuple[Mode, str]:
    """How the library will be compared, and why not where it will not be."""
    if asked.verify is False:
        return "off", "--no-verify"
    why = _unverifiable(checkpoint, target, quantization, asked.target)
    if why and asked.verify:
        problems.append(Problem(f"the library cannot be verified: {why}", "--verify", AWAY))
    if why or checkpoint.config is None:
        return "off", why
    return choose_mode(checkpoint.config, asked.verify), ""


def _unverifiable(
    checkpoint: MlcCheckpoint, target: MlcTarget | None, quantization: str | None, asked: str
) -> str:
    if checkpoint.config is None:
        return f"mlcawq has no PyTorch reference of {checkpoint.model_type} to compare it with"
    if quantization is not None and quantization not in QUANTIZATIONS:
        return f"{quantization} rounds the weights, so that the checkpoint's logits are not its own"
    if target is None or quantization is None:
        return ""
    if target.target is None:
        return f"mlcawq has no engine for {asked}"
    return missing_device(target.target, quantization)


def notes(program: Program) -> list[str]:
    """What a user should read about the environment: what is used, and what may go wrong."""
    interpreter = program.interpreter
    lines = [f"{interpreter} ({interpreter.python})"]
    return lines + [
        f"warning: {skew.what}\n  -> {skew.fix}"
        for skew in interpreter.skews
        if skew.breaks == "nothing"
    ]
