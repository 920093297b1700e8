"""Making TVM run on NVIDIA's GPUs: what may be missing, and what is said of it (stub driver)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cuda_stub import StubMachine, can_be_built

from mlcawq.engine import cuda_runtime
from mlcawq.engine.cuda_driver import find_driver

needs_stub = pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")

_LOAD = """
import json
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.cuda_runtime import load_cuda_runtime
driver, reason, fix = load_cuda_runtime()
import tvm
gpus = [] if driver is None else [[g.index, g.arch, g.memory] for g in driver.gpus]
exist = [bool(tvm.cuda(i).exist) for i in range(2)] if driver else []
print(json.dumps([gpus, exist, reason, fix]))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> StubMachine:
    return StubMachine(tmp_path_factory.mktemp("stub"))


def load(machine: StubMachine, **settings: int) -> tuple[list, list, str, str]:
    answer = machine.run(_LOAD, **settings)
    assert answer.status == 0, answer.output
    gpus, exist, reason, fix = json.loads(answer.output.splitlines()[-1])
    return gpus, exist, reason, fix


@needs_stub
def test_a_process_that_only_runs_models_gets_tvms_cuda_runtime(machine: StubMachine) -> None:
    gpus, exist, reason, _ = load(machine, gpus=1, capability=89, memory=2**34)
    assert gpus == [[0, "sm_89", 2**34]]
    assert exist == [True, False]
    assert reason == ""


@needs_stub
def test_a_driver_that_is_too_old(machine: StubMachine) -> None:
    gpus, _, reason, fix = load(machine, cuda=12080)
    assert gpus == []
    assert "runs CUDA 12.8, and 13.0 is needed" in reason
    assert "580" in fix


@needs_stub
def test_a_driver_without_gpus(machine: StubMachine) -> None:
    gpus, _, reason, _ = load(machine, gpus=0)
    assert gpus == []
    assert "no GPU" in reason


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlcawq.engine.cuda_driver._LIBRARY", "libcuda-that-is-not-there.so.1")
    assert find_driver() == (None, "no NVIDIA driver is installed")
    cuda_runtime.load_cuda_runtime.cache_clear()
    driver, reason, fix = cuda_runtime.load_cuda_runtime()
    cuda_runtime.load_cuda_runtime.cache_clear()
    assert driver is None
    assert reason == "no NVIDIA driver is installed"
    assert fix


def test_the_cuda_runtime_of_the_packages_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = list(cuda_runtime._packaged())
    assert [path.name for path in packaged] == ["libcudart.so.13"]
    monkeypatch.setattr(cuda_runtime, "_CUDART", "libcudart-that-is-not-there.so")
    monkeypatch.setattr(cuda_runtime, "_packaged", lambda: iter(packaged))
    cuda_runtime._load_cudart()
    monkeypatch.setattr(cuda_runtime, "_packaged", lambda: iter(()))
    problem = cuda_runtime._load()
    assert problem is not None
    assert "the CUDA runtime cannot be loaded" in problem[0]
    assert problem[1] == "pip install 'mlcawq[cuda]'"


def test_a_tvm_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_runtime, "_load_cudart", lambda: None)
    monkeypatch.setattr(cuda_runtime.libinfo, "package_lib_paths", lambda: [tmp_path])
    problem = cuda_runtime._load()
    assert problem is not None
    assert "built without CUDA" in problem[0]
    (tmp_path / cuda_runtime._LIBRARY).write_bytes(b"no library")
    problem = cuda_runtime._load()
    assert problem is not None
    assert "cannot be loaded" in problem[0]
