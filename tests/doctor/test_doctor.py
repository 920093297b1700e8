"""The doctor on machines made up for the purpose: whatever is missing or broken, a report."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from cuda_stub import StubMachine, can_be_built
from fake_mlc import FakeMlc
from made_up_gpu import GPU

from mlcawq.doctor import compilers, cuda, machine, mlc, packages, vulkan
from mlcawq.doctor.findings import Finding
from mlcawq.doctor.processes import run, run_python
from mlcawq.doctor.report import _safely, capabilities, examine
from mlcawq.engine.processor import Processor
from tir_kernels.levels import levels_of


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but what the test puts there."""
    for variable in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", mlc.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_programs_that_fail_are_answers() -> None:
    assert run(["/nonexistent/program"]).error == "not found"
    assert run(["/bin/sh", "-c", "echo seen; exit 3"]).error == "seen"
    assert run(["/bin/sh", "-c", "kill -11 $$"]).error == "killed by signal 11"
    assert run(["/bin/sh", "-c", "sleep 30"], timeout=0.2).error == "no answer in 0 s"
    assert run(["/bin/sh", "-c", "echo fine"]).first_line == "fine"
    assert run_python("print('noise'); print('{\"a\": 1}')") == ({"a": 1}, "")
    assert run_python("print('no json')") == ({}, "unreadable answer")
    assert run_python("import os; os.abort()")[1].startswith("killed by signal")


def test_the_compiler_is_found_and_checked(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = compilers.cxx_finding()
    assert (finding.status, finding.value) == ("missing", "none found")
    assert finding.fix
    program(only, "apt-get", "")
    assert compilers.cxx_finding().fix == "sudo apt-get install g++"
    program(only, "g++", "echo 'g++ 14.1'")
    assert compilers.cxx_finding().value == f"g++ 14.1 ({only / 'g++'})"
    monkeypatch.setenv("CXX", str(program(only, "mine", "echo 'no licence' >&2; exit 1")))
    broken = compilers.cxx_finding()
    assert (broken.status, "no licence" in broken.value) == ("broken", True)


def test_a_tvm_that_cannot_be_imported_is_broken_not_fatal() -> None:
    (finding,) = compilers.tvm_findings({}, "killed by signal 11")
    assert finding.status == "broken"
    assert "pip install apache-tvm" in finding.fix
    probe = {"version": "0.26.0", "ffi": "0.1", "codegen": ["c"], "devices": [], "llvm": None}
    statuses = {f.name: f.status for f in compilers.tvm_findings(probe, "")}
    assert statuses["llvm"] == "missing"


def test_known_bad_pairs() -> None:
    assert packages.known_bad({"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.14.post1"}) == []
    (crash,) = packages.known_bad({"apache-tvm-ffi": "0.1.15.post2"})
    assert (crash.status, "tensorize" in crash.value) == ("broken", True)
    (two,) = packages.known_bad({"apache-tvm": "0.26.0", "mlc-ai-nightly-cpu": "0.20"})
    assert "mlc-ai-nightly-cpu" in two.value
    assert mlc.VARIABLE in two.fix


def test_missing_and_untested_packages() -> None:
    found = {f.name: f for f in packages.findings({"torch": "2.0.1+cu118"})}
    assert found["transformers"].status == "missing"
    assert "pip install 'transformers" in found["transformers"].fix
    assert found["torch"].status == "warning"
    assert found["sentencepiece"].status == "info"
    here = {f.name: f.status for f in packages.findings()}
    assert here["apache-tvm"] == "ok"


def test_without_an_nvidia_driver(only: Path) -> None:
    (nothing,) = cuda._gpus()
    assert (nothing.status, nothing.value) == ("info", "no NVIDIA driver is installed")
    program(only, "nvidia-smi", "echo 'driver/library version mismatch' >&2; exit 18")
    (broken,) = cuda._gpus()
    assert broken.status == "broken"
    assert "mismatch" in broken.value


_CUDA_FINDINGS = """
import json
from dataclasses import asdict
from mlcawq.doctor import cuda
from mlcawq.doctor.report import capabilities
found = cuda.findings({})
print(json.dumps([[asdict(f) for f in found], [asdict(c) for c in capabilities(found)]]))
"""


@pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")
def test_nvidia(tmp_path: Path) -> None:
    def examine_cuda(machine: StubMachine, **settings: object) -> tuple[dict, dict]:
        answer = machine.run(_CUDA_FINDINGS, **settings)
        assert answer.status == 0, answer.output
        found, able = json.loads(answer.output.splitlines()[-1])
        return {f["name"]: f for f in found}, {c["name"]: c for c in able}

    machine = StubMachine(tmp_path)
    found, able = examine_cuda(machine, gpus=2, capability=86, memory=24 * 10**9)
    assert found["gpu 1"]["value"] == "Stub GPU 1 (sm_86), 24.0 GB, driver for CUDA 13.0"
    assert found[cuda.RUNTIME]["status"] == "ok"
    assert able["chat and evaluate on CUDA"]["works"]
    assert able["build for CUDA"]["works"]

    found, able = examine_cuda(machine, cuda=12040)
    assert "runs CUDA 12.4, and 13.0 is needed" in found[cuda.RUNTIME]["value"]
    assert able["chat and evaluate on CUDA"]["fix"] == "install driver 580 or newer"


def test_no_compiler_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlcawq.build import cuda_compiler

    monkeypatch.setattr(cuda_compiler, "find_nvrtc", lambda: (None, "NVRTC is not installed"))
    monkeypatch.setattr(cuda_compiler, "find_nvcc", lambda: None)
    finding = cuda._compiler()
    assert finding.status == "info"
    assert "NVRTC is not installed" in finding.value
    assert finding.fix == "pip install 'mlcawq[cuda]'"


def test_vulkan_drivers(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VK_DRIVER_FILES", str(only / "lvp_icd.x86_64.json"))
    assert "lvp_icd" in vulkan._drivers().value
    assert all(isinstance(finding, Finding) for finding in vulkan.findings())


def test_vulkan_devices_and_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe_says(answer: dict[str, object], error: str = "") -> list[Finding]:
        monkeypatch.setattr(vulkan, "run_python", lambda *_args, **_options: (answer, error))
        return vulkan._runtime()

    single = dataclasses.asdict(dataclasses.replace(GPU, shader_f16=False))
    found = probe_says({"devices": [dataclasses.asdict(GPU), single], "what": "", "fix": ""})
    assert [(f.name, f.status) for f in found] == [
        ("vulkan:0", "ok"),
        ("vulkan:1", "ok"),
        (vulkan.RUNTIME, "ok"),
    ]
    assert "Some GPU (discrete, vulkan, 1.2), float16, 128 MiB" in found[0].value
    assert "q4f32_autoawq" in found[1].value
    assert {c.name: c.works for c in capabilities(found)}["chat and evaluate on Vulkan"]

    (absent,) = probe_says({"devices": [], "what": "no wgpu", "fix": "pip install it"})
    assert (absent.status, absent.fix) == ("info", "pip install it")
    (crashed,) = probe_says({}, "killed by signal 11")
    assert crashed.status == "broken"
    *_, changed = probe_says({"devices": [single], "what": "comes back changed", "fix": "update"})
    assert changed.status == "broken"
    assert not {c.name: c.works for c in capabilities([changed])}["chat and evaluate on Vulkan"]


def test_mlc_llm_is_asked_of_the_named_interpreter(
    only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here,) = mlc.findings()
    assert here.status == "info"
    monkeypatch.setenv(mlc.VARIABLE, str(only / "python"))
    (absent,) = mlc.findings()
    assert absent.status == "broken"
    assert "does not exist" in absent.value
    fake = FakeMlc(only / "environment")
    monkeypatch.setenv(mlc.VARIABLE, str(fake.python))
    found = {finding.name: finding for finding in mlc.findings()}
    assert {name: finding.status for name, finding in found.items()} == {
        mlc.BUILDS: "ok",
        "its tvm": "info",
        mlc.RUNS: "ok",
    }
    assert f"0.20.0, Python 3.11.7 ({fake.python})" in found[mlc.BUILDS].value
    assert "apache-tvm 0.26.0, ffi 0.1.14.post1; code for c, cuda, llvm" in found["its tvm"].value

    fake.answers(module="", imports=False, tvm="0.27.0")
    found = {finding.name: finding for finding in mlc.findings()}
    assert found[mlc.BUILDS].status == "ok"
    assert "it builds, and cannot chat" in found[mlc.RUNS].value
    assert found["version skew"].status == "warning"
    assert "0.27.0" in found["version skew"].value
    able = {c.name: c for c in capabilities(list(found.values()))}
    assert able["build through mlc_llm"].works
    assert not able["run built folders with mlc_llm"].works

    fake.answers(generators=["c", "cuda"])
    broken = {finding.name: finding for finding in mlc.findings()}
    assert broken[mlc.BUILDS].status == "broken"
    assert "without LLVM" in broken[mlc.BUILDS].value
    assert "pip install" in broken["version skew"].fix

    monkeypatch.setenv(mlc.VARIABLE, sys.executable)
    (lacking,) = mlc.findings()
    assert lacking.status == "broken"
    assert "mlc.ai/wheels" in lacking.fix
    able = {c.name: c for c in capabilities([lacking])}
    assert "not installed" in able["run built folders with mlc_llm"].lacks


def test_a_probe_that_fails_unforeseen_is_a_finding() -> None:
    def fails() -> list[Finding]:
        raise RuntimeError("boom")

    (finding,) = _safely("cuda", fails)
    assert "boom" in finding.value


def test_capabilities_follow_from_findings() -> None:
    good = [Finding("compilers", "tvm", "ok", ""), Finding("compilers", "llvm", "ok", "")]
    works = {c.name: c for c in capabilities(good)}
    assert works["build for the CPU"].works
    bad = [*good, Finding("compilers", "c++ compiler", "missing", "none", "apt install g++")]
    works = {c.name: c for c in capabilities(bad)}
    assert not works["build for the CPU"].works
    assert works["build for the CPU"].fix == "apt install g++"
    assert works["chat and evaluate on the CPU"].works
    broken = [Finding("packages", "torch", "missing", "not installed", "pip install torch")]
    assert not any(c.works for c in capabilities(broken) if "CPU" in c.name)


def test_the_machine_is_described() -> None:
    names = {finding.name for finding in machine.findings()}
    assert names >= {"system", "python", "processor", "memory", "disk here"}


def test_the_level_of_the_processor() -> None:
    levels = levels_of("x86_64")
    here = Processor("x86_64", frozenset(levels[1].features))
    assert machine._level(here) == f"; level {levels[1].name}"
    below = Processor("x86_64", frozenset(levels[0].features) - {"popcnt"})
    assert machine._level(below).endswith("(lacks popcnt)")
    assert machine._level(Processor("x86_64", None)) == ""
    assert machine._level(Processor("riscv64", frozenset())) == ""


def test_a_whole_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mlc.VARIABLE, os.devnull)
    report = examine()
    assert report.find("mlc_llm").status == "broken"  # type: ignore[union-attr]
    assert report.find("llvm").status == "ok"  # type: ignore[union-attr]
    assert {c.name: c.works for c in report.capabilities}["build for the CPU"]
    assert json.loads(json.dumps(report.as_json()))["capabilities"]


def test_the_doctor_needs_nothing_that_may_be_missing() -> None:
    """Everything that mlcawq depends on is hidden; the report still comes, and says what is."""
    code = """
import json, sys

class Hidden:
    names = ("numpy", "psutil", "torch", "tvm", "tvm_ffi", "transformers", "tokenizers", "jinja2")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from mlcawq.doctor import machine, packages, report
machine_names = [f.name for f in machine.findings()]
compiler = report._safely("compilers", lambda: [report.compilers.cxx_finding()])
print(json.dumps({"machine": machine_names, "compiler": compiler[0].value,
                  "packages": len(packages.findings())}))
"""
    found, error = run_python(code)
    assert error == ""
    assert "python" in found["machine"]
    assert "memory" not in found["machine"]
    assert found["packages"] > 10
