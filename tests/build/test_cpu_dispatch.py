"""Which of its variants a library runs, decided by its own code when it is loaded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from dispatched_library import dispatched_library

from mlcawq.build.cpu_dispatch import Provided, dispatch_source
from mlcawq.engine.cpu_library import LEVEL_FUNCTION, LEVEL_VARIABLE, read_record
from mlcawq.engine.processor import this_processor
from tir_kernels.levels import FEATURES, levels_of

PROCESSOR = this_processor()
LEVELS = [(level.name, level.features) for level in levels_of(PROCESSOR.architecture)]
HERE = [level.name for level in PROCESSOR.levels]
pytestmark = pytest.mark.skipif(not HERE, reason="no level of instruction sets is known here")


@pytest.fixture(autouse=True)
def not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)


def missing_feature() -> str:
    """One that this machine's processor does not have; no processor has all of x86's."""
    known = FEATURES[PROCESSOR.architecture]
    lacking = PROCESSOR.lacks(tuple(feature.name for feature in known))
    if not lacking:
        pytest.skip("this processor has every feature that is known")
    return lacking[0]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_best_level_is_the_one_that_the_system_lists(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    library = tvm.runtime.load_module(str(dispatched_library(tmp_path / "a.so", LEVELS, compiler)))
    best = [name for name, _ in LEVELS].index(HERE[-1])
    assert library["which"]() == best
    assert library[LEVEL_FUNCTION]() == best
    assert library["shared"]() == -1


def test_every_level_can_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = dispatched_library(tmp_path / "a.so", LEVELS)
    for name in HERE:
        monkeypatch.setenv(LEVEL_VARIABLE, name)
        copy = shutil.copy(original, tmp_path / f"{name}.so")  # a file is loaded once
        library = tvm.runtime.load_module(copy)
        assert LEVELS[library["which"]()][0] == name
        assert LEVELS[library[LEVEL_FUNCTION]()][0] == name


def test_each_feature_is_found_as_the_system_lists_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [feature.name for feature in FEATURES[PROCESSOR.architecture]]
    original = dispatched_library(tmp_path / "a.so", [(name, (name,)) for name in names])
    for i, name in enumerate(names):
        monkeypatch.setenv(LEVEL_VARIABLE, name)
        library = tvm.runtime.load_module(shutil.copy(original, tmp_path / f"{name}.so"))
        found = library[LEVEL_FUNCTION]()
        assert found == (-1 if PROCESSOR.lacks((name,)) else i), name


def test_no_level_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = dispatched_library(tmp_path / "a.so", [("future", (missing_feature(),))])
    library = tvm.runtime.load_module(str(path))
    assert library[LEVEL_FUNCTION]() == -1
    for kernel in ("which", "shared"):
        with pytest.raises(RuntimeError, match=r"none of the instruction sets.*\(future\)"):
            library[kernel]()


@pytest.mark.parametrize("name", ["future", "nonsense"])
def test_a_level_that_is_not_there_cannot_be_forced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, name)
    variants = [*LEVELS, ("future", (missing_feature(),))]
    library = tvm.runtime.load_module(str(dispatched_library(tmp_path / "a.so", variants)))
    with pytest.raises(RuntimeError, match=f"{LEVEL_VARIABLE}={name}: .* does not have it"):
        library["which"]()


_MAIN = """
#include <stdio.h>
#include <tvm/ffi/c_api.h>
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) { puts(text); (void)kind; }
int __tvm_ffi_which(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
int main(void) {
  TVMFFIAny result = {0};
  int failed = __tvm_ffi_which(NULL, NULL, 0, &result);
  printf("%d %d", failed, (int)result.v_int64);
  return 0;
}
"""


_NONE = "this processor has none of the instruction sets"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "cpu", "expected"),
    [
        ("aarch64", "cortex-a53", "0 0"),
        ("aarch64", "neoverse-n1", "0 1"),
        ("x86_64", "Conroe", _NONE),
        ("x86_64", "Nehalem", "0 0"),
        ("x86_64", "Haswell", "0 1"),
    ],
)
def test_emulated_processors(tmp_path: Path, architecture: str, cpu: str, expected: str) -> None:
    prefix = "" if architecture == PROCESSOR.architecture else f"{architecture}-linux-gnu-"
    compiler, emulator = f"{prefix}gcc", f"qemu-{architecture}"
    for program in (compiler, emulator):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")
    levels = levels_of(architecture)
    provided = [
        Provided(level.name, level.features, {"which": f"which__{i}"})
        for i, level in enumerate(levels)
    ]
    kernels = "".join(
        f"int __tvm_ffi_which__{i}(void *s, const TVMFFIAny *a, int n, TVMFFIAny *result) "
        f"{{ (void)s, (void)a, (void)n; result->v_int64 = {i}; return 0; }}\n"
        for i in range(len(levels))
    )
    (tmp_path / "dispatch.c").write_text(dispatch_source(architecture, provided))
    (tmp_path / "main.c").write_text(_MAIN + kernels)
    includes = (
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
    )
    command = [compiler, "-static", "-Wall", "-Wextra", "-Werror", "-o", "main"]
    command += [*(f"-I{include}" for include in includes), "dispatch.c", "main.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = [emulator, "-cpu", cpu, "./main"]
    assert subprocess.check_output(run, cwd=tmp_path, text=True).startswith(expected)


def test_the_record_can_be_read_from_the_file(tmp_path: Path) -> None:
    record = read_record(dispatched_library(tmp_path / "a.so", LEVELS))
    assert record is not None
    assert record.architecture == PROCESSOR.architecture
    assert [(variant.name, variant.features) for variant in record.variants] == LEVELS
