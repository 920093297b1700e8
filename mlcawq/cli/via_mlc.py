"""The options of `mlcawq build` and its steps that go through mlc_llm."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlcawq.build.pipeline import BuildRequest, BuildResult, Reporter
    from mlcawq.build.via_mlc.commands import Extra
    from mlcawq.build.via_mlc.plan import MlcRequest
    from mlcawq.build.via_mlc.steps import Step

_VIA = "--via mlc-llm"


class Through(str, Enum):
    """Whose compiler builds, where it is not ours."""

    MLC_LLM = "mlc-llm"


Via = Annotated[
    Through | None,
    typer.Option(
        "--via",
        help="Let an installed mlc_llm do it. --target then takes its words too (metal, rocm, "
        "android, webgpu, …), and --quantization its names.",
    ),
]
MlcPython = Annotated[
    str | None,
    typer.Option(
        "--mlc-python",
        metavar="PATH",
        help="The Python that has mlc_llm.  [default: $MLCAWQ_MLC_PYTHON, or this one]",
    ),
]
NoPlugin = Annotated[
    bool,
    typer.Option(
        "--no-plugin",
        help="Run mlc_llm as it is, without AWQ for all its families and our kernels.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help=f"With {_VIA}: check everything, print the commands to type, run none."
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ARGUMENTS",
        help=f"With {_VIA}: more of its own arguments for the step.",
        show_default=False,
    ),
]


def more_arguments(step: str) -> Any:
    """The option that passes arguments on to one step of a build."""
    return typer.Option(
        f"--{step}-args",
        metavar="TEXT",
        help=f"More arguments for mlc_llm {step.replace('-', '_')}, in one text.",
        show_default=False,
    )


@dataclass(frozen=True)
class ViaOptions:
    """What was given of these options."""

    via: Through | None
    mlc_python: str | None
    no_plugin: bool
    dry_run: bool

    def check(self, **more: object) -> None:
        """Refuse, as wrong usage, options that do nothing without --via. more: further ones."""
        given = {
            "--mlc-python": self.mlc_python is not None,
            "--no-plugin": self.no_plugin,
            "--dry-run": self.dry_run,
            **{f"--{name.replace('_', '-')}": bool(value) for name, value in more.items()},
        }
        alone = [option for option, there in given.items() if there]
        if self.via is None and alone:
            raise typer.BadParameter(f"goes with {_VIA}", param_hint=", ".join(alone))

    def check_step(self, arguments: Sequence[str] | None) -> None:
        """As `check`, for a step with arguments of mlc_llm's own."""
        self.check()
        if self.via is None and arguments:
            raise typer.BadParameter(
                f"{' '.join(arguments)}: one argument is expected; more go with {_VIA}"
            )

    def request(self, build: BuildRequest, extra: Extra) -> MlcRequest:
        from mlcawq.build.via_mlc.plan import MlcRequest

        python = None if self.mlc_python is None else Path(self.mlc_python)
        return MlcRequest(build, python, not self.no_plugin, extra)


def step_arguments(step: str, words: Sequence[str] | None) -> Extra:
    """Arguments after `--` for one step. Raises UserError for those that mlcawq sets itself."""
    from mlcawq.build.via_mlc.commands import Extra, check_extra

    check_extra(step, words or (), "--")
    return Extra(**{step: tuple(words or ())})


def build(
    checkpoint: Path, out: Path, request: MlcRequest, *, dry_run: bool, json_output: bool
) -> BuildResult | None:
    """Build, or print what to type, after which there is no result."""
    from mlcawq.build.via_mlc import pipeline, plan

    if not dry_run:
        return pipeline.build(checkpoint, out, request, reporter())
    planned = plan.check(checkpoint, out, request)
    for note in planned.notes:
        print(note, file=sys.stderr)
    overwrite = request.build.overwrite
    _print_lines(plan.dry_run(planned, out, overwrite=overwrite), json_output)
    return None


def run_step(step: Step, *, dry_run: bool, json_output: bool) -> None:
    """Take a step and print what it wrote, or print what to type."""
    if dry_run:
        for note in step.notes:
            print(note, file=sys.stderr)
        _print_lines(step.typed(), json_output)
        return
    written = step.run(reporter())
    if json_output:
        print(json.dumps({"file": str(written), "bytes": written.stat().st_size}, indent=2))
    else:
        print(written)


def reporter() -> Reporter:
    """Lines on stderr, between those of mlc_llm."""
    from mlcawq.build.pipeline import Reporter

    class Lines(Reporter):
        def stage(self, text: str) -> None:
            print(f"{text} ...", file=sys.stderr, flush=True)

        def message(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

    return Lines()


def _print_lines(lines: Sequence[str], json_output: bool) -> None:
    if json_output:
        print(json.dumps({"commands": list(lines)}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines))
