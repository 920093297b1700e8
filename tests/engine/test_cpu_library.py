"""Libraries that this machine cannot run are refused with one message, before they are loaded."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tvm
from dispatched_library import dispatched_library

from mlcawq.engine import processor as module
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.cpu_library import (
    LEVEL_VARIABLE,
    check_processor,
    read_record,
)
from mlcawq.engine.library_file import is_cut_short, machine_of, section_of
from mlcawq.engine.processor import Processor, this_processor
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.errors import UserError
from mlcawq.inspection import describe
from tir_kernels.levels import features_in, levels_of

HERE = this_processor()
LEVELS = [(level.name, level.features) for level in levels_of("x86_64")]
on_x86 = pytest.mark.skipif(HERE.architecture != "x86_64", reason="faked processors are x86")

# What Linux lists for the first processor with these instruction sets, and for a plain one.
NEHALEM = "fpu sse sse2 ht pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
CORE_2 = "fpu sse sse2 ht pni ssse3 cx16 sse4_1 lahf_lm"


@pytest.fixture(autouse=True)
def not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the system list other flags than it does."""

    def become(flags: str) -> None:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: made up\nflags\t\t: {flags}\n")
        monkeypatch.setattr(module, "CPUINFO", cpuinfo)

    return become


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all x86 levels."""
    return dispatched_library(tmp_path_factory.mktemp("library") / "lib-cpu.so", LEVELS)


@on_x86
def test_the_best_level_that_is_there(library: Path) -> None:
    for i, (name, features) in enumerate(LEVELS):
        found = check_processor(library, Processor("x86_64", frozenset(features)))
        assert found is not None
        assert found.name == name, i
    believed = check_processor(library, Processor("x86_64", None))
    assert believed is not None
    assert believed.name == LEVELS[-1][0]


@on_x86
def test_below_the_lowest_level(library: Path, machine: Callable[[str], None]) -> None:
    machine(NEHALEM)
    found = check_processor(library)
    assert found is not None
    assert found.name == "x86-64-v2"
    machine(CORE_2)
    words = r"lib-cpu.so: this processor cannot run the library, .*x86-64-v2.* lacks popcnt, sse4.2"
    with pytest.raises(UserError, match=words):
        check_processor(library)
    told = describe(library)
    assert told.facts["instruction sets"].startswith("x86_64: x86-64-v2, ")
    assert "lacks popcnt" in str(told.problems[0])


@on_x86
def test_forced_levels(
    library: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(f"{NEHALEM} avx avx2 bmi1 bmi2 f16c fma abm movbe")
    monkeypatch.setenv(LEVEL_VARIABLE, "x86-64-v2")
    found = check_processor(library)
    assert found is not None
    assert found.name == "x86-64-v2"
    monkeypatch.setenv(LEVEL_VARIABLE, "avxvnni")
    with pytest.raises(UserError, match=r"MLCAWQ_CPU_LEVEL=avxvnni: this processor lacks avxvnni"):
        check_processor(library)
    monkeypatch.setenv(LEVEL_VARIABLE, "avx9")
    with pytest.raises(UserError, match=r"MLCAWQ_CPU_LEVEL=avx9: .*no variant of that name \(it"):
        check_processor(library)


@on_x86
def test_other_architectures(library: Path, tmp_path: Path) -> None:
    arm = Processor("aarch64", frozenset({"neon"}))
    with pytest.raises(UserError, match="the library is for x86_64, and this machine is aarch64"):
        check_processor(library, arm)
    foreign = tmp_path / "lib-cpu.so"
    content = bytearray(library.read_bytes())
    struct.pack_into("<H", content, 0x12, 183)  # EM_AARCH64
    foreign.write_bytes(content)
    assert machine_of(foreign) == "aarch64"
    with pytest.raises(UserError, match="the library is for aarch64, and this machine is x86_64"):
        check_processor(foreign)
    problems = describe(foreign).problems
    assert len(problems) == 1
    assert "is for aarch64" in str(problems[0])


@on_x86
def test_a_model_carried_to_a_lesser_machine(
    built: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: str) -> None:
        raise AssertionError("loaded before it was known to run here")

    machine(CORE_2)
    monkeypatch.setattr(tvm.runtime, "load_module", load)
    with pytest.raises(UserError) as error:
        ModelRuntime(read_folder(built), "cpu")
    (problem,) = error.value.problems
    assert problem.where == str(built / "lib-cpu.so")
    assert re.search(r"for native: it lacks .*popcnt", problem.what)
    assert f"mlcawq compile {built} --target cpu" in problem.fix


def test_files_that_record_nothing(tmp_path: Path, library: Path) -> None:
    text = tmp_path / "lib-cpu.so"
    text.write_text("no library")
    assert machine_of(text) is None
    assert section_of(text, ".text") is None
    assert not is_cut_short(text)
    assert check_processor(text) is None
    assert section_of(library, ".no.such.section") is None
    assert section_of(library, ".text")
    short = tmp_path / "short.so"
    short.write_bytes(library.read_bytes()[:-100])
    assert is_cut_short(short)
    assert not is_cut_short(library)


def test_a_damaged_record(tmp_path: Path, library: Path) -> None:
    damaged = tmp_path / "lib-cpu.so"
    damaged.write_bytes(library.read_bytes().replace(b'{"architecture"', b'["architecture"'))
    with pytest.raises(UserError, match="is damaged"):
        read_record(damaged)


def test_what_linux_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"fp", "asimd", "aes", "fphp", "asimdhp", "asimddp"}
    assert features_in(arm, "aarch64") == {"neon", "fullfp16", "dotprod"}
    assert features_in(arm - {"asimdhp"}, "aarch64") == {"neon", "dotprod"}
    assert features_in(arm, "riscv64") == set()
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "absent")
    assert this_processor().features is None
    assert this_processor().lacks(("avx2",)) == []


@on_x86
def test_tiles_that_the_system_does_not_give(
    machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(f"{NEHALEM} avx2 amx_tile amx_int8 amx_bf16")
    monkeypatch.setattr(module, "_may_use_tiles", lambda: True)
    assert {"amx-tile", "amx-int8"} <= (this_processor().features or set())
    monkeypatch.setattr(module, "_may_use_tiles", lambda: False)
    features = this_processor().features or frozenset()
    assert "avx2" in features
    assert not any(name.startswith("amx-") for name in features)
