"""Opening an engine quickly is opening the same engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlcawq.engine.engine import Engine
from mlcawq.engine.opening import open_engine
from mlcawq.engine.sampling import SamplingParams
from mlcawq.errors import UserError

_OPEN = """
import gc, json, sys
from pathlib import Path
from mlcawq.engine.opening import open_engine
from mlcawq.engine.runtime_only import without_blas_threads
from mlcawq.engine.sampling import SamplingParams
without_blas_threads()
engine = open_engine(Path(sys.argv[1]), "cpu", max_batch=1, max_total_tokens=64, threads=1)
from tvm_ffi import core
assert core._object_type_key_to_index("no.such.type") is None
assert "torch" not in sys.modules and "tvm.relax" not in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 0
params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
print(json.dumps([i for delta in engine.generate("The quick", params) for i in delta.token_ids]))
"""


def test_it_answers_as_any_engine(built: Path, engine: Engine) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _OPEN, str(built)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = [i for delta in engine.generate("The quick", params) for i in delta.token_ids]
    assert json.loads(result.stdout) == expected


def test_classes_of_types_are_registered_as_tvm_does_it() -> None:
    code = (
        "import os, sys\n"
        "{how}\n"
        "import tvm\n"
        "classes = [c for name, module in list(sys.modules.items()) if name.startswith('tvm')\n"
        "           for c in vars(module).values() if isinstance(c, type)]\n"
        "print(sorted({{f'{{c.__module__}}.{{c.__qualname__}}' for c in classes\n"
        "              if '__tvm_ffi_type_info__' in c.__dict__}}))\n"
    )
    ours = "from mlcawq.engine.runtime_only import import_tvm_runtime; import_tvm_runtime()"
    plain = "os.environ['TVM_USE_RUNTIME_LIB'] = '1'; sys.modules['torch'] = None"
    found = [
        subprocess.run(
            [sys.executable, "-c", code.format(how=how)], capture_output=True, text=True, check=True
        ).stdout
        for how in (ours, plain)
    ]
    assert "'tvm." in found[0]
    assert found[0] == found[1]


def test_errors_are_those_of_an_engine(own_built: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_engine(tmp_path / "none", "cpu")
    (own_built / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        open_engine(own_built, "cpu")
