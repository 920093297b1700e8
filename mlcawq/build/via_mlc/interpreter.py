"""Finding mlc_llm: the interpreter that has it, what is in there, and what does not fit together.

mlc_llm brings a TVM of its own that cannot live beside ours, so it is looked at, and later run, in
a process of the interpreter that the user names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlcawq.build.via_mlc.skews import (
    NEEDED,
    VARIABLE,
    Skew,
    dotted,
    find_skews,
    install_line,
    tvm_distributions,
)
from mlcawq.errors import Problem, UserError, raise_all

OPTION = "--mlc-python"
MARK = "mlcawq-probe "
_SECONDS = 180.0  # a cold import of TVM from a network drive takes long
_FAILED = "it ends with an error"
_LONGEST_LINE = 300
_MOST_BYTES = 2**22  # of a program that is no Python and floods its output
_NVRTC = re.compile(r"(^|-)(nvrtc|cuda-toolkit)(-|$)")
_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class MlcInterpreter:
    """An interpreter that has mlc_llm.

    python: the interpreter, as it was named (an environment is told by this path).
    mlc_llm, tvm, tvm_ffi: versions. tvm_distribution: the package that `tvm` came with and its
        version, empty where none is known.
    module: mlc_llm's compiled library, empty where it lacks; imports: whether mlc_llm can be
        imported with it.
    generators: TVM's code generators ("llvm", "cuda", "vulkan", …).
    cuda_compiler: nvcc's path, or the package that has NVRTC; empty where neither is there.
    models, awq_models, quantizations, conv_templates: the names in mlc_llm's own tables, None
        where its source could not be read. awq_models have both a loader and a quantizer.
    options: step -> the options of its command line, for the steps whose source could be read.
    packages: version of each package that the steps need, empty for those that lack.
    """

    python: Path
    python_version: tuple[int, ...]
    mlc_llm: str
    mlc_llm_path: str
    module: str
    imports: bool
    tvm: str
    tvm_distribution: str
    tvm_ffi: str
    generators: tuple[str, ...]
    cuda_compiler: str
    packages: Mapping[str, str]
    skews: tuple[Skew, ...] = ()
    models: frozenset[str] | None = None
    awq_models: frozenset[str] | None = None
    quantizations: frozenset[str] | None = None
    conv_templates: frozenset[str] | None = None
    options: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        tvm = self.tvm_distribution or f"tvm {self.tvm}"
        return f"mlc_llm {self.mlc_llm} with {tvm}, Python {dotted(self.python_version)}"


def find_mlc(python: Path | str | None = None, *, plugin: bool = True) -> MlcInterpreter:
    """The interpreter to run mlc_llm in: `python`, the one in MLCAWQ_MLC_PYTHON, or our own.

    plugin: whether our plug-in is to run there. Raises UserError when that one is no Python or has
    no mlc_llm, or when what it has does not fit together so badly that no step can succeed.
    """
    interpreter = examine_mlc(python)
    if interpreter is None:
        raise UserError.one(
            f"no Python with mlc_llm is known: it is not in this environment, and {VARIABLE} is "
            "not set",
            OPTION,
            f"name one with {OPTION}, or install it: {install_line()}",
        )
    raise_all(
        Problem(skew.what, str(interpreter.python), skew.fix)
        for skew in interpreter.skews
        if skew.breaks == "everything" or (skew.breaks == "plugin" and plugin)
    )
    return interpreter


def examine_mlc(python: Path | str | None = None) -> MlcInterpreter | None:
    """As `find_mlc`, with whatever does not fit left in `skews`; None where no interpreter was
    named and our own has no mlc_llm.
    """
    named, where = (str(python), OPTION) if python is not None else (_from_environment(), VARIABLE)
    if not named:
        facts = _probe(Path(sys.executable))
        return _interpreter(Path(sys.executable), facts) if facts.get("installed") else None
    path = _executable(named, where)
    facts = _probe(path)
    if "python" not in facts:
        raise UserError.one(
            f"{path} is no Python that runs: {facts['error']}",
            where,
            "give the Python of the environment that mlc_llm is installed in",
        )
    if "installed" in facts and not facts["installed"]:
        raise UserError.one(
            f"mlc_llm is not installed for {path} (Python {dotted(facts['python'])})",
            where,
            # mlc.ai's wheels bring a TVM that would overwrite one that is there.
            install_line(None if facts.get("has_tvm") else path),
        )
    return _interpreter(path, facts)


def other_environment() -> dict[str, str]:
    """Our environment variables for a process of another interpreter.

    An engine of ours asks TVM to leave its compiler out; that holds for our process alone.
    """
    return {key: value for key, value in os.environ.items() if key != "TVM_USE_RUNTIME_LIB"}


def _from_environment() -> str:
    return os.environ.get(VARIABLE, "").strip()


def _executable(named: str, where: str) -> Path:
    """The interpreter that was meant: a file, a command, or the folder of an environment.

    Links are kept: an environment's python is a link, and is told by where the link lies.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        inside = path / "bin" / "python"
        if not inside.exists():
            raise UserError.one(
                f"{path} is a folder, and no environment: it has no bin/python",
                where,
                "give the Python of the environment that mlc_llm is installed in",
            )
        path = inside
    elif not path.exists() and os.sep not in named:
        path = Path(shutil.which(named) or path)
    if not path.exists():
        raise UserError.one(
            f"{named} does not exist", where, f"correct it, or install mlc_llm: {install_line()}"
        )
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UserError.one(
            f"{named} is not an executable file",
            where,
            "give the Python of the environment that mlc_llm is installed in",
        )
    return Path(os.path.abspath(path))


def _probe(python: Path) -> dict[str, Any]:
    """The facts that the probe printed, and under "error" why it printed no more."""
    facts: dict[str, Any] = {}
    output, errors, ending = _run(python)
    for line in output.splitlines():
        if line.startswith(MARK):
            try:
                facts.update(json.loads(line[len(MARK) :]))
            except ValueError:
                break
    if ending or "installed" not in facts:
        facts["error"] = ending or "it does not answer as one"
    if ending == _FAILED:
        last = (errors.strip() or output.strip()).splitlines()[-1:]
        # Another program may well repeat the whole text that it was given.
        facts["error"] = last[0].strip() if last and len(last[0]) < _LONGEST_LINE else ending
    return facts


def _run(python: Path) -> tuple[str, str, str]:
    """(stdout, stderr, how it ended: "" well, "failed", or what else happened to it)."""
    try:
        process = subprocess.Popen(
            [str(python), "-c", _PROBE.read_text(encoding="utf-8")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=other_environment(),
            start_new_session=True,
        )
    except OSError as error:
        return "", "", str(error.strerror or error)
    assert process.stdout is not None
    assert process.stderr is not None
    late = threading.Timer(_SECONDS, _kill, (process,))
    late.start()
    errors: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(process.stderr, errors), daemon=True)
    reader.start()
    try:
        output = process.stdout.read(_MOST_BYTES)
        flooding = len(output) == _MOST_BYTES
        if flooding:
            _kill(process)
        status = process.wait()
    except BaseException:
        _kill(process)
        process.wait()
        raise
    finally:
        timed_out = not late.is_alive()
        late.cancel()
        reader.join(timeout=5)
        process.stdout.close()
    text = output.decode(errors="replace"), b"".join(errors).decode(errors="replace")
    if flooding:
        return (*text, "it floods its output")
    if timed_out:
        return (*text, f"no answer in {_SECONDS:.0f} s")
    if status < 0:
        return (*text, f"killed by signal {-status}")
    return (*text, _FAILED if status else "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process with all that it started, which would hold its output open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _drain(stream: Any, kept: list[bytes]) -> None:
    """Read to the end, so that the writer never waits; keep the last part."""
    while block := stream.read1(65536):
        kept.append(block)
        del kept[:-16]
    stream.close()


def _interpreter(python: Path, facts: Mapping[str, Any]) -> MlcInterpreter:
    versions: Mapping[str, str] = facts.get("versions", {})
    owners = tvm_distributions(versions)

    def table(key: str) -> frozenset[str] | None:
        names = facts.get(key)
        return frozenset(names) if names else None

    return MlcInterpreter(
        python=python,
        python_version=tuple(facts["python"]),
        mlc_llm=facts.get("mlc_llm") or "of unknown version",
        mlc_llm_path=facts.get("mlc_llm_path", ""),
        module=facts.get("module", ""),
        imports=bool(facts.get("imports")),
        tvm=facts.get("tvm", ""),
        tvm_distribution=f"{owners[0]} {versions[owners[0]]}" if owners else "",
        tvm_ffi=facts.get("tvm_ffi", ""),
        generators=tuple(facts.get("generators", ())),
        cuda_compiler=facts.get("nvcc") or next((n for n in versions if _NVRTC.search(n)), ""),
        packages={name: versions.get(name, "") for name in NEEDED},
        skews=tuple(find_skews(python, facts)),
        models=table("models"),
        awq_models=table("awq_models"),
        quantizations=table("quantizations"),
        conv_templates=table("conv_templates"),
        options={
            step: frozenset(words) for step, words in facts.get("options", {}).items() if words
        },
    )
