"""Targets and refusals of compile_model; what it computes is tested in tests/graph."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from mlcawq.build.compile import compile_model
from mlcawq.build.link import find_compiler
from mlcawq.build.targets import resolve_target
from mlcawq.checkpoint.config import read_config
from mlcawq.errors import UserError


def test_target_as_json() -> None:
    arch = "x86-64" if platform.machine() == "x86_64" else "generic"
    target = resolve_target(json.dumps({"kind": "llvm", "mcpu": arch}))
    assert target.attrs["mcpu"] == arch


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("gpu", "none of cpu, cpu:native"),
        ("metal", "metal is not supported"),
        ('{"kind": "hexagon"}', "hexagon is not supported"),
        ('["llvm"]', "names no kind"),
        ("vulkan:1", "vulkan:portable"),
        ('{"kind": "webgpu", "no_such_key": 1}', "does not accept"),
        ('{"kind": "llvm", "mtriple": "riscv64-linux-gnu"}', "another architecture"),
        ('{"kind": "llvm", "no_such_key": 1}', "does not accept"),
    ],
)
def test_targets_that_are_refused(target: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_target(target)


def test_float32_is_refused_for_cuda(tmp_path: Path) -> None:
    config = read_config(make_tiny_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"float32.*\n.*--quantization q0f16"):
        compile_model(config, tmp_path / "lib.so", "cuda:sm_80", "q0f32")
    assert not (tmp_path / "lib.so").exists()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        find_compiler()


def test_a_compiler_that_cannot_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho 'cannot find -lc' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    config = read_config(make_tiny_model(tmp_path / "model", layers=1))
    library = tmp_path / "out" / "lib-cpu.so"
    with pytest.raises(UserError, match="linking failed"):
        compile_model(config, library, "cpu:native")
    assert list(library.parent.iterdir()) == []


def test_sizes_are_checked_before_compiling(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "mistral", layers=1, sliding_window=64)
    with pytest.raises(UserError, match="sliding window"):
        compile_model(read_config(folder), tmp_path / "lib.so", context_window_size=100)
    assert not (tmp_path / "lib.so").exists()
