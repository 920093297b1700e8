"""The WebGPU runtime as a library: compiled once, and enough for what TVM compiled elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from test_wgpu_kernels import multiply_add
from wgpu_for_tests import Random, needs_vulkan, output, run_python

from mlcawq.engine import wgpu
from mlcawq.engine.wgpu import native
from mlcawq.errors import UserError

BUILD = """
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.wgpu.native import built_library
print(built_library())
"""


def fake_compiler(path: Path, script: str) -> str:
    """A compiler that answers --version and otherwise does `script` with $output to fill."""
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\n'
        'while [ "$1" != -o ]; do shift; done\noutput="$2"\n' + script
    )
    path.chmod(0o755)
    return str(path)


def test_several_processes_compile_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = fake_compiler(tmp_path / "c++", f'echo once >> {log}; sleep 1; echo it > "$output"')
    environment = {
        "CXX": compiler,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    processes = [run_python(BUILD, **environment) for _ in range(2)]
    paths = {output(process).strip() for process in processes}
    assert len(paths) == 1
    library = Path(paths.pop())
    assert library.is_relative_to(tmp_path / "cache")
    assert library.read_text() == "it\n"
    assert log.read_text() == "once\n"
    assert sorted(p.suffix for p in library.parent.iterdir()) == [".lock", library.suffix]


def test_a_missing_compiler_is_named_and_not_needed_twice(tmp_path, monkeypatch) -> None:
    kept = native.built_library()
    monkeypatch.setattr(native, "_find_compiler", lambda: None)
    assert native.built_library().parent == kept.parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no C\+\+ compiler was found.*\n.*apt install g\+\+"):
        native.built_library()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch) -> None:
    script = "echo 'the disk is made of cheese' >&2; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="the disk is made of cheese"):
        native.built_library()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_home_that_cannot_be_written_to_is_no_obstacle(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", 'echo built > "$output"'))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert native.built_library().read_text() == "built\n"


def test_wgpu_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed\n.*pip install "mlcawq\[vulkan\]"'):
        native.built_library()


@needs_vulkan
def test_no_driver_is_told_with_what_to_install() -> None:
    code = "from mlcawq.engine import wgpu; print(wgpu.adapters()); wgpu.load()"
    process = run_python(code, VK_ICD_FILENAMES="/nowhere.json", VK_DRIVER_FILES="/nowhere.json")
    told, complaint = process.communicate(timeout=60)
    assert told == "()\n"
    assert "UserError: no Vulkan driver offers a device" in complaint
    assert "mesa-vulkan-drivers" in complaint


RUN = """
import sys
from mlcawq.engine import wgpu
wgpu.load()
import numpy as np, tvm
assert "torch" not in sys.modules and "tvm.relax" not in sys.modules, "more than the runtime"
device = tvm.device("webgpu", 0)
inputs = np.load(sys.argv[2])
a, b = (tvm.runtime.tensor(inputs[k], device=device) for k in "ab")
out = tvm.runtime.tensor(np.full(a.shape, np.nan, "float32"), device=device)
tvm.runtime.load_module(sys.argv[1])["multiply_add"](a, b, 3.0, out)
np.testing.assert_allclose(out.numpy(), inputs["a"] * 3 + inputs["b"], rtol=1e-5, atol=1e-5)
print("right")
"""


@needs_vulkan
@pytest.mark.parametrize("exporter", ["this runtime", "TVM alone"])
def test_an_exported_library_runs_with_the_runtime_alone(
    exporter: str, tmp_path: Path, monkeypatch
) -> None:
    wgpu.load()
    if exporter == "TVM alone":
        monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
    library, inputs = tmp_path / "lib.so", tmp_path / "inputs.npz"
    built = tvm.compile(multiply_add("float32"), target=tvm.target.Target("webgpu", host="llvm"))
    built.export_library(str(library))
    random = Random()
    np.savez(inputs, a=random.floats(1000), b=random.floats(1000))
    assert output(run_python(RUN, str(library), str(inputs))) == "right\n"
