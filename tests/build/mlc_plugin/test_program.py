"""The plug-in's entry: how it starts where mlcawq is not installed, and what it brings along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlcawq.build.mlc_plugin import __main__ as entry
from mlcawq.build.mlc_plugin.program import main

FILE = Path(entry.__file__)
ROOT = FILE.parents[3]

# An mlc_llm without its compiled module, and as much of TVM as starting it touches.
FAKES = {
    "mlc_llm/__init__.py": """
import tvm_ffi

@tvm_ffi.register_object("mlc.Tokenizer")
class Tokenizer:
    pass
""",
    "mlc_llm/__main__.py": "",
    "mlc_llm/libinfo.py": "def find_lib_path(name, optional=False):\n    return []\n",
    "mlc_llm/tokenizers/__init__.py": "",
    "mlc_llm/tokenizers/_ffi_api.py": "",
    "mlc_llm/support/__init__.py": "",
    "mlc_llm/support/auto_device.py": "def _device_exists(device):\n    return False\n",
    "mlc_llm/cli/__init__.py": "",
    "mlc_llm/cli/gen_config.py": """
import importlib.util, json, os, sys
from mlc_llm.support import auto_device
from mlc_llm.tokenizers import _ffi_api

class Device:
    exist = True

def main(argv):
    names = ("mlcawq", "tir_kernels", "typer")
    found = {name: bool(importlib.util.find_spec(name)) for name in names}
    print(json.dumps({
        "argv": argv,
        "path": sys.path,
        "found": found,
        "skips": os.environ.get("SKIP_LOADING_MLCLLM_SO"),
        "device": auto_device._device_exists(Device),
        "tokenizer_info": _ffi_api.DetectTokenizerInfo("nowhere"),
    }))
""",
    "tvm/__init__.py": "",
    "tvm/relax.py": "class Var:\n    name = 'x'\n",
    "tvm_ffi.py": """
def register_object(key):
    def decorate(cls):
        raise ValueError("Cannot find object type index for " + key)
    return decorate
""",
}


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    for name, text in FAKES.items():
        file = tmp_path / "fakes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "fakes"


def run_by_path(fakes: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """With nothing installed (-S leaves site-packages out), from a folder that is not ours."""
    return subprocess.run(
        [sys.executable, "-S", str(FILE), *words],
        capture_output=True,
        text=True,
        cwd=fakes.parent,
        env={**os.environ, "PYTHONPATH": str(fakes)},
        check=False,
    )


def test_runs_by_path_where_it_is_not_installed(fakes: Path) -> None:
    done = run_by_path(fakes, "--stock", "gen_config", "folder", "--quantization", "q4f16_1")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["argv"] == ["folder", "--quantization", "q4f16_1"]
    assert said["found"] == {"mlcawq": True, "tir_kernels": True, "typer": False}
    ours = {str(ROOT), str(FILE.parent)}
    assert not ours & {str(Path(entry or ".").resolve()) for entry in said["path"]}


def test_missing_compiled_module_is_made_up_for(fakes: Path) -> None:
    said = json.loads(run_by_path(fakes, "--stock", "gen_config").stdout)
    assert said["skips"] == "1"
    assert said["device"] is True
    assert said["tokenizer_info"] == "{}"


def test_absent_mlc_llm_is_an_error_for_users(tmp_path: Path) -> None:
    (tmp_path / "fakes").mkdir()
    done = run_by_path(tmp_path / "fakes", "compile", "folder")
    assert done.returncode == 1
    assert done.stderr.startswith("error: mlc_llm is not installed in this interpreter")
    assert "Traceback" not in done.stderr


def test_finder_finds_our_packages_only(tmp_path: Path) -> None:
    finder = entry.PackageFinder(ROOT)
    for name in entry.PACKAGES:
        spec = finder.find_spec(name)
        assert spec is not None
        assert spec.origin == str(ROOT / name / "__init__.py")
        assert spec.submodule_search_locations == [str(ROOT / name)]
    assert finder.find_spec("tests") is None
    assert finder.find_spec("mlcawq.errors", [str(ROOT / "mlcawq")]) is None


@pytest.mark.parametrize("words", [[], ["chat"], ["--stock"]])
def test_unknown_steps_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert "usage: mlc_plugin" in capsys.readouterr().err


def test_help_names_the_steps(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    assert "{gen_config,convert_weight,compile}" in capsys.readouterr().out


def test_entry_imports_next_to_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import mlcawq.build.mlc_plugin.program\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert foreign == {"mlcawq"}
