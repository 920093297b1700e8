"""The quantizers that are compared, each in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import read_config
from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.writing import write_json
from mlcawq.errors import UserError

_HERE = Path(__file__).resolve().parent
_DEFAULT = _HERE.parent.parent / ".peers" / "autoawq" / "bin" / "python"


class _Runner:
    """Jobs as JSON files for a script under some interpreter."""

    name: str
    python: Path
    script: str

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


class Ours(_Runner):
    """This project, under the interpreter that runs now."""

    name = "mlcawq"
    python = Path(sys.executable)
    script = "ours_runner.py"


class AutoAwq(_Runner):
    """AutoAWQ 0.2.9, corrected for the CPU (autoawq_runner.py).

    python: its interpreter; None takes MLCAWQ_AUTOAWQ_PYTHON, or what setup_autoawq.sh makes.
    Raises UserError when there is none.
    """

    name = "AutoAWQ"
    script = "autoawq_runner.py"

    def __init__(self, python: Path | None = None) -> None:
        self.python = python or Path(os.environ.get("MLCAWQ_AUTOAWQ_PYTHON", _DEFAULT))
        if not self.python.is_file():
            raise UserError.one(
                "no AutoAWQ environment there",
                str(self.python),
                "make one with scripts/peers/setup_autoawq.sh, or name its Python with --autoawq",
            )

    @staticmethod
    def readable(folder: Path, out: Path) -> Path:
        """Links to a checkpoint's files beside a config.json that transformers 4.51 reads."""
        out.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json":
                (out / file.name).symlink_to(file.resolve())
        write_json(out / "config.json", portable_config(read_config(folder)))
        return out
