"""The quantizers that are compared, each in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from mlcawq.checkpoint.decoder_config import read_decoder_config
from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.writing import write_json
from mlcawq.errors import UserError
from mlcawq.quantize.recipe import load_recipe, recipe_names

_HERE = Path(__file__).resolve().parent
_ENVIRONMENTS = _HERE.parent.parent / ".peers"


class Runner:
    """Jobs as JSON files for a script under some interpreter.

    methods: what the job key "method" can be, by the names that tables show.
    options: further keys of the job, by those names.
    """

    name: str
    python: Path
    script: str
    methods: ClassVar[dict[str, str]]
    options: ClassVar[dict[str, dict[str, Any]]] = {}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Have one job done: see the script. Raises UserError, after its log, when it fails."""
        with tempfile.TemporaryDirectory() as folder:
            path, result = Path(folder) / "job.json", Path(folder) / "result.json"
            path.write_text(json.dumps({**job, "result": str(result)}))
            command = [self.python, "-W", "ignore", _HERE / self.script, path]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode != 0 or not result.is_file():
                sys.stderr.write(done.stdout.decode(errors="replace"))
                raise UserError.one(
                    f"{self.name} failed (exit status {done.returncode}); its log is above",
                    str(self.python),
                )
            content: dict[str, Any] = json.loads(result.read_text())
            return content

    def readable(self, folder: Path, out: Path) -> Path:
        """The checkpoint `folder` as this quantizer can read it; `out` is there to be made."""
        return folder


SYMMETRIC_CLIPPING = "awq, symmetric clips"


def _weight_only_recipes() -> list[str]:
    """The shipped recipes that leave activations alone, as every peer's method here does."""
    return [
        name for name in recipe_names() if load_recipe(name).model_dump().get("activations") is None
    ]


class Ours(Runner):
    """This project, under the interpreter that runs now."""

    name = "mlcawq"
    python = Path(sys.executable)
    script = "ours_runner.py"
    methods: ClassVar = {
        **{name: name for name in _weight_only_recipes()},
        SYMMETRIC_CLIPPING: "awq",
    }
    options: ClassVar = {SYMMETRIC_CLIPPING: {"overrides": {"clip": {"mode": "symmetric"}}}}


class Peer(Runner):
    """Another project, corrected for the CPU where its script says so.

    key: names setup_KEY.sh, KEY_runner.py and MLCAWQ_KEY_PYTHON.
    package: what it is called on PyPI.
    python: its interpreter; None takes that variable, or what the setup script makes.
    Raises UserError when there is none.
    """

    key: str
    package: str

    def __init__(self, python: Path | None = None) -> None:
        made = _ENVIRONMENTS / self.key / "bin" / "python"
        variable = f"MLCAWQ_{self.key.upper()}_PYTHON"
        self.script = f"{self.key}_runner.py"
        self.python = python or Path(os.environ.get(variable, made))
        if not self.python.is_file():
            raise UserError.one(
                f"no {self.name} environment there",
                str(self.python),
                f"make one with scripts/peers/setup_{self.key}.sh, or name its Python with "
                f"--{self.key} or {variable}",
            )


class AutoAwq(Peer):
    """AutoAWQ 0.2.9."""

    name, key, package = "AutoAWQ", "autoawq", "autoawq"
    methods: ClassVar = {"AutoAWQ": "awq"}

    def readable(self, folder: Path, out: Path) -> Path:
        """Links to a checkpoint's files beside a config.json that transformers 4.51 reads."""
        out.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json":
                (out / file.name).symlink_to(file.resolve())
        write_json(out / "config.json", portable_config(read_decoder_config(folder)))
        return out


class GptqModel(Peer):
    """GPTQModel: GPTQ and AWQ."""

    name, key, package = "GPTQModel", "gptqmodel", "gptqmodel"
    methods: ClassVar = {"GPTQModel GPTQ": "gptq", "GPTQModel AWQ": "awq"}


class AutoRound(Peer):
    """AutoRound: rounding learned by signed gradient."""

    name, key, package = "AutoRound", "autoround", "auto-round"
    methods: ClassVar = {"AutoRound": "signround"}


class LlmCompressor(Peer):
    """llm-compressor: AWQ and GPTQ."""

    name, key, package = "llm-compressor", "llmcompressor", "llmcompressor"
    methods: ClassVar = {"llm-compressor AWQ": "awq", "llm-compressor GPTQ": "gptq"}


PEERS: tuple[type[Peer], ...] = (AutoAwq, GptqModel, AutoRound, LlmCompressor)
