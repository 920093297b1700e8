"""mlc_llm, which lives in an environment of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mlcawq.doctor.findings import Finding
from mlcawq.doctor.processes import run_python

AREA = "mlc_llm"
VARIABLE = "MLCAWQ_MLC_PYTHON"
INSTALL = (
    "python -m venv mlc && mlc/bin/pip install --pre -U -f https://mlc.ai/wheels "
    "mlc-llm-nightly-cpu mlc-ai-nightly-cpu (or -cu130 for CUDA 13), then "
    f"export {VARIABLE}=$PWD/mlc/bin/python"
)

_PROBE = """
import importlib.util, json
if importlib.util.find_spec("mlc_llm") is None:
    print(json.dumps({"installed": False}))
else:
    import mlc_llm, tvm
    print(json.dumps({"installed": True, "version": str(getattr(mlc_llm, "__version__", "?")),
                      "tvm": tvm.__version__}))
"""


def findings() -> list[Finding]:
    named = os.environ.get(VARIABLE)
    python = named or sys.executable
    if named and not os.access(named, os.X_OK):
        problem = "is not an executable file" if Path(named).exists() else "does not exist"
        fix = f"point {VARIABLE} at the Python of mlc_llm's environment, or unset it"
        return [Finding(AREA, "mlc_llm", "broken", f"{VARIABLE}={named} {problem}", fix)]
    probe, error = run_python(_PROBE, python, timeout=120)
    if error:
        value = f"cannot be imported by {python}: {error}"
        return [Finding(AREA, "mlc_llm", "broken", value, INSTALL)]
    if not probe["installed"]:
        status, value = (
            ("broken", f"not installed for {python}")
            if named
            else ("info", "not installed (optional; its folders are read and written without it)")
        )
        return [Finding(AREA, "mlc_llm", status, value, INSTALL)]  # type: ignore[arg-type]
    value = f"{probe['version']} with tvm {probe['tvm']} ({python})"
    return [Finding(AREA, "mlc_llm", "ok", value)]
