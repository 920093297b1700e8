"""Finding mlc_llm, and naming what does not fit together there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_mlc import FACTS, FakeMlc

from mlcawq.build.via_mlc import interpreter
from mlcawq.build.via_mlc.interpreter import (
    MARK,
    examine_mlc,
    find_mlc,
    other_environment,
)
from mlcawq.build.via_mlc.skews import VARIABLE, find_skews
from mlcawq.errors import UserError

PROBE = Path(interpreter.__file__).with_name("probe.py")


@pytest.fixture
def fake(tmp_path: Path) -> FakeMlc:
    return FakeMlc(tmp_path / "environment" / "bin")


def refusal(named: object) -> str:
    with pytest.raises(UserError) as error:
        find_mlc(str(named))
    return str(error.value)


def test_what_is_there_is_found(fake: FakeMlc, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_mlc(fake.python)
    assert found.python == fake.python
    assert str(found) == "mlc_llm 0.20.0 with apache-tvm 0.26.0, Python 3.11.7"
    assert found.imports
    assert found.awq_models == {"llama"}
    assert "llvm" in found.generators
    assert found.skews == ()
    # An environment's folder is as good, and so is the variable.
    assert find_mlc(fake.python.parents[1]).python == fake.python
    monkeypatch.setenv(VARIABLE, str(fake.python))
    assert find_mlc().python == fake.python


def test_the_option_wins_over_the_variable_and_over_ourselves(
    fake: FakeMlc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/nonexistent/python")
    assert find_mlc(fake.python).python == fake.python
    with pytest.raises(UserError, match=f"{VARIABLE}: /nonexistent/python does not exist"):
        find_mlc()
    monkeypatch.delenv(VARIABLE)
    assert examine_mlc() is None
    with pytest.raises(UserError, match="no Python with mlc_llm is known") as error:
        find_mlc()
    assert "pip install --pre -U -f https://mlc.ai/wheels" in str(error.value)


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "python"
    plain.write_text("text")
    assert "is not an executable file" in refusal(plain)
    assert "it has no bin/python" in refusal(tmp_path)
    assert "is no Python that runs" in refusal("/bin/ls")
    assert "does not answer as one" in refusal("/bin/true")
    plain.write_text("#!/bin/sh\nyes 'a line that goes on for ever'\n")
    plain.chmod(0o755)
    assert "floods its output" in refusal(plain)
    plain.write_text("#!/nonexistent/interpreter\n")
    assert "is no Python that runs" in refusal(plain)
    plain.write_text("#!/bin/sh\nkill -9 $$\n")
    assert "killed by signal 9" in refusal(plain)


def test_a_program_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_SECONDS", 0.3)
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    assert "no answer in 0 s" in refusal(hanging)


def test_a_python_without_mlc_llm_gets_the_pip_line(fake: FakeMlc) -> None:
    fake.answers(installed=False, has_tvm=False)
    message = refusal(fake.python)
    assert "mlc_llm is not installed" in message
    assert f"-> {fake.python} -m pip install --pre -U -f https://mlc.ai/wheels mlc-llm" in message
    # Where a TVM is, mlc.ai's would overwrite it.
    fake.answers(installed=False)
    assert "-> python -m venv mlc &&" in refusal(fake.python)


def test_a_crash_leaves_what_was_found_before(fake: FakeMlc) -> None:
    fake.answers(until="import tvm", end="crash")
    message = refusal(fake.python)
    assert "import tvm fails: killed by signal 11" in message
    fake.answers(until="import mlc_llm", end="crash")
    assert "does not fit the TVM 0.26.0" in refusal(fake.python)
    # Steps can do without a module that only does not load.
    fake.answers(until="import mlc_llm", end=1)
    found = find_mlc(fake.python)
    assert not found.imports
    assert [skew.breaks for skew in found.skews] == ["nothing"]


def skews(**changed: object) -> list[tuple[str, str, str]]:
    facts = {key: value for part in FACTS for key, value in part.items()} | changed
    found = find_skews(Path("/env/bin/python"), facts)
    return [(skew.breaks, skew.what, skew.fix) for skew in found]


VERSIONS = FACTS[1]["versions"]


@pytest.mark.parametrize(
    ("changed", "breaks", "what", "fix"),
    [
        (
            {"versions": {**VERSIONS, "mlc-ai-nightly-cpu": "0.20"}},
            "everything",
            "apache-tvm and mlc-ai-nightly-cpu both install the module `tvm`",
            "pip uninstall -y apache-tvm mlc-ai-nightly-cpu && ",
        ),
        (
            {"has_tvm": False},
            "everything",
            "mlc_llm is here and its TVM is not",
            "pip install apache-tvm==0.26.0 apache-tvm-ffi==0.1.14.post1",
        ),
        (
            {"tvm": "0.20.0", "names_present": ["tir", "dlight"]},
            "everything",
            "written for a TVM that is newer than the 0.20.0 here: it imports tvm.tirx",
            "pip install apache-tvm==0.26.0",
        ),
        (
            {"names_wanted": ["dlight", "tir"]},
            "everything",
            "written for a TVM that is older than the 0.26.0 here: it imports tvm.tir",
            "pip install",
        ),
        (
            {"generators": ["c", "cuda"]},
            "everything",
            "built without LLVM",
            "pip install",
        ),
        (
            {"versions": {k: v for k, v in VERSIONS.items() if k not in ("torch", "safetensors")}},
            "everything",
            "not installed: torch, safetensors",
            "pip install torch safetensors",
        ),
        (
            {"imports": False, "error": "ModuleNotFoundError: No module named 'prompt_toolkit.x'"},
            "everything",
            "import mlc_llm fails",
            "pip install prompt-toolkit",
        ),
        ({"python": [3, 9, 2]}, "plugin", "Python 3.9.2; our plug-in needs 3.10", "python -m venv"),
        (
            {"tvm_ffi": "0.1.15.post2"},
            "nothing",
            "crashes the process in Schedule.tensorize",
            "apache-tvm-ffi==0.1.14.post1",
        ),
        (
            {"module": "", "tvm": "0.27.0"},
            "nothing",
            "tested on apache-tvm 0.26.0, and this is 0.27.0",
            "apache-tvm==0.26.0",
        ),
        (
            {"versions": {**VERSIONS, "apache-tvm-ffi": "0.1.9"}},
            "nothing",
            "wants apache-tvm-ffi>=0.1.13.post2, and apache-tvm-ffi is 0.1.9",
            "pip install 'apache-tvm-ffi>=0.1.13.post2'",
        ),
    ],
)
def test_skews_are_named_with_the_pip_line(
    changed: dict[str, object], breaks: str, what: str, fix: str
) -> None:
    found = skews(**changed)
    assert any(b == breaks and what in w and fix in f for b, w, f in found), found


def test_wheels_of_two_variants_are_a_skew() -> None:
    wheels = {k: v for k, v in VERSIONS.items() if k != "apache-tvm"}
    wheels |= {"mlc-llm-nightly-cu130": "0.20", "mlc-ai-nightly-cpu": "0.20"}
    ((breaks, what, fix),) = skews(versions=wheels)
    assert breaks == "everything"
    assert "mlc-ai's is cpu and mlc-llm's is cu130" in what
    assert "mlc-llm-nightly-cu130 mlc-ai-nightly-cu130" in fix
    wheels["mlc-ai-nightly-cu130"] = wheels.pop("mlc-ai-nightly-cpu")
    assert skews(versions=wheels) == []


def test_an_old_python_serves_without_the_plugin(fake: FakeMlc) -> None:
    fake.answers(python=[3, 9, 2])
    assert "our plug-in needs 3.10" in refusal(fake.python)
    assert find_mlc(fake.python, plugin=False).python_version == (3, 9, 2)


def test_the_engines_own_switch_stays_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")
    monkeypatch.setenv("SOMETHING", "else")
    assert "TVM_USE_RUNTIME_LIB" not in other_environment()
    assert other_environment()["SOMETHING"] == "else"


MODEL = """
from x import quantize
MODELS: dict = {
    "both": Model(source={"huggingface-torch": a, "awq": b},
                  quantize=make_quantization_functions(c, supports_awq=True)),
    "by_hand": Model(source={"awq": b}, quantize={"awq": d, "no-quant": e}),
    "no_quantizer": Model(source={"awq": b}, quantize=make_quantization_functions(c)),
    "no_loader": Model(source={"huggingface-torch": a},
                       quantize=make_quantization_functions(c, supports_awq=True)),
}
"""


def probe(folder: Path) -> dict[str, object]:
    """The probe's answer in this interpreter, with the packages of `folder` before all others."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    # A future import has to come first: the probe is run as a whole after the path is set.
    code += f"exec(compile(open({str(PROBE)!r}).read(), 'probe', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    facts: dict[str, object] = {"status": done.returncode}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            facts |= json.loads(line[len(MARK) :])
    return facts


def test_the_probe_reads_the_tables_without_importing(tmp_path: Path) -> None:
    package = tmp_path / "mlc_llm"
    for name in ("model", "quantization", "interface", "cli"):
        (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / "libinfo.py").write_text(
        "__version__ = '9.9'\ndef find_lib_path(name, optional=False):\n    return []\n"
    )
    (package / "model" / "model.py").write_text(MODEL)
    (package / "model" / "one.py").write_text("from tvm import tirx\n")
    (package / "quantization" / "quantization.py").write_text("QUANTIZATION = {'q1': 1, 'q2': 2}")
    (package / "interface" / "gen_config.py").write_text("CONV_TEMPLATES = {'chatml', 'LM'}")
    (package / "cli" / "compile.py").write_text(
        "def main(argv):\n    p = P()\n    p.add_argument('model')\n"
        "    p.add_argument('--output', '-o', help='x')\n"
    )
    tvm = tmp_path / "tvm"
    tvm.mkdir()
    (tvm / "__init__.py").write_text("__version__ = '0.1'\nraise RuntimeError('too old')")
    facts = probe(tmp_path)
    assert facts["installed"] is True
    assert facts["mlc_llm"] == "9.9"
    assert facts["module"] == ""
    assert facts["models"] == ["both", "by_hand", "no_quantizer", "no_loader"]
    assert facts["awq_models"] == ["both", "by_hand"]
    assert facts["quantizations"] == ["q1", "q2"]
    assert sorted(facts["conv_templates"]) == ["LM", "chatml"]  # type: ignore[call-overload]
    assert facts["names_wanted"] == ["tirx"]
    assert facts["options"] == {
        "gen_config": None,
        "convert_weight": None,
        "compile": ["--output", "-o"],
    }
    # TVM's import failed, and everything before it was told.
    assert facts["stage"] == "import tvm"
    assert facts["status"] == 1
    assert "tvm" not in facts

    (package / "model" / "model.py").write_text("MODELS = make()")
    (package / "libinfo.py").write_text("raise OSError('broken')")
    unreadable = probe(tmp_path)
    assert (unreadable["models"], unreadable["awq_models"]) == (None, None)
    assert unreadable["libinfo"] == "broken"


def test_the_probe_sees_a_real_tvm(tmp_path: Path) -> None:
    package = tmp_path / "mlc_llm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    facts = probe(tmp_path)
    assert facts["status"] == 0
    assert facts["tvm"] == "0.26.0"
    assert "llvm" in facts["generators"]  # type: ignore[operator]
    assert facts["names_present"] == ["tirx", "s_tir"]
    assert "imports" not in facts
