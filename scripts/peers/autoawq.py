"""Our side of AutoAWQ: its interpreter, the jobs it is given, and models in a form it reads."""

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


class AutoAwq:
    """AutoAWQ 0.2.9 behind another interpreter (autoawq_runner.py says what it can be asked).

    python: that interpreter; None takes MLCAWQ_AUTOAWQ_PYTHON, or what setup_autoawq.sh makes.
    Raises UserError when there is none.
    """

    def __init__(self, python: Path | None = None) -> None:
        self.python = python or Path(os.environ.get("MLCAWQ_AUTOAWQ_PYTHON", _DEFAULT))
        if not self.python.is_file():
            raise UserError.one(
                "no AutoAWQ environment there",
                str(self.python),
                "make one with scripts/peers/setup_autoawq.sh, or name its Python with --autoawq",
            )

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Have one job done. Raises UserError with the end of its log when it fails."""
        with tempfile.TemporaryDirectory() as folder:
            path, result = Path(folder) / "job.json", Path(folder) / "result.json"
            path.write_text(json.dumps({**job, "result": str(result)}))
            command = [str(self.python), "-W", "ignore", str(_HERE / "autoawq_runner.py"), path]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if done.returncode != 0 or not result.is_file():
                log = done.stdout.decode(errors="replace")
                print(log, file=sys.stderr)
                raise UserError.one(f"AutoAWQ failed at {job['task']!r}", str(self.python))
            content: dict[str, Any] = json.loads(result.read_text())
            return content


def peer_copy(folder: Path, out: Path) -> Path:
    """The checkpoint with links to its files and a config.json that transformers 4.51 reads."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != "config.json":
            (out / file.name).symlink_to(file.resolve())
    write_json(out / "config.json", portable_config(read_config(folder)))
    return out
