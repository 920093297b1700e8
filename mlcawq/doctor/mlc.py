"""mlc_llm, which lives in an environment of its own."""

from __future__ import annotations

from mlcawq.build.via_mlc.interpreter import MlcInterpreter, examine_mlc
from mlcawq.build.via_mlc.skews import VARIABLE, dotted, install_line
from mlcawq.doctor.findings import Finding
from mlcawq.errors import UserError

__all__ = ["AREA", "BUILDS", "RUNS", "VARIABLE", "findings"]

AREA = "mlc_llm"
BUILDS = "mlc_llm"
RUNS = "mlc_llm's engine"


def findings() -> list[Finding]:
    try:
        found = examine_mlc()
    except UserError as error:
        problem = error.problems[0]
        where = f"{problem.where}: " if problem.where else ""
        return [Finding(AREA, BUILDS, "broken", f"{where}{problem.what}", problem.fix)]
    if found is None:
        value = "not installed (optional; its folders are read and written without it)"
        return [Finding(AREA, BUILDS, "info", value, install_line())]
    return [_builds(found), _tvm(found), _engine(found), *_skews(found)]


def _builds(found: MlcInterpreter) -> Finding:
    value = f"{found.mlc_llm}, Python {dotted(found.python_version)} ({found.python})"
    fatal = next((skew for skew in found.skews if skew.breaks == "everything"), None)
    if fatal is not None:
        return Finding(AREA, BUILDS, "broken", f"{value}: {fatal.what}", fatal.fix)
    return Finding(AREA, BUILDS, "ok", value)


def _tvm(found: MlcInterpreter) -> Finding:
    tvm = found.tvm_distribution or f"version {found.tvm}"
    value = f"{tvm}, ffi {found.tvm_ffi}; code for {', '.join(found.generators) or 'nothing'}"
    return Finding(AREA, "its tvm", "info" if found.tvm else "broken", value)


def _engine(found: MlcInterpreter) -> Finding:
    if found.imports:
        return Finding(AREA, RUNS, "ok", found.module)
    value = (
        f"its compiled module does not load ({found.module})"
        if found.module
        else "it has no compiled module: it builds, and cannot chat or serve"
    )
    return Finding(AREA, RUNS, "info", value, install_line())


def _skews(found: MlcInterpreter) -> list[Finding]:
    status = {"everything": "broken", "plugin": "warning", "nothing": "warning"}
    return [
        Finding(AREA, "version skew", status[skew.breaks], skew.what, skew.fix)  # type: ignore[arg-type]
        for skew in found.skews
    ]
