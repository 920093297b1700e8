"""The plug-in's command line: which step, what is registered before it, how it fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from mlcawq.errors import UserError

STEPS = ("gen_config", "convert_weight", "compile")
_USAGE = f"""usage: mlc_plugin [--stock] {{{",".join(STEPS)}}} ARGUMENTS

Runs one step of mlc_llm with its own arguments (STEP --help lists them) and AWQ for every family
that mlc_llm can run.

  --stock  make only what mlc_llm needs to start on this TVM; register nothing
"""


def main(arguments: Sequence[str]) -> int:
    """Run one step; returns the exit status: 0 done, 1 the user's error, 2 usage, 130 interrupt."""
    words = list(arguments)
    stock = words[:1] == ["--stock"]
    if stock:
        del words[0]
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE)
        return 0
    if not words or words[0] not in STEPS:
        sys.stderr.write(_USAGE)
        return 2
    try:
        run(words[0], words[1:], stock)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    return 0


def run(step: str, arguments: list[str], stock: bool = False) -> None:
    """Import mlc_llm, prepare it and let it run `step`.

    Raises UserError, and SystemExit for usage errors that mlc_llm's parser finds.
    """
    from mlcawq.build.mlc_plugin import compatibility

    compatibility.import_mlc_llm()
    compatibility.install()
    if step != "gen_config":  # the other two trace the model
        from mlcawq.build.mlc_plugin import routing

        routing.install()
    if step == "compile":
        from mlcawq.build.mlc_plugin import compiler_passes

        compiler_passes.install()
    command = importlib.import_module(f"mlc_llm.cli.{step}")
    if stock:
        command.main(arguments)
        return
    from mlcawq.build.mlc_plugin import loading, quantization, steps

    quantization.register()
    loading.register()
    if step == "compile":
        from mlcawq.build.mlc_plugin import compiling

        compiling.install()
    with ExitStack() as until:
        steps.prepare(step, command, until)
        command.main(arguments)
