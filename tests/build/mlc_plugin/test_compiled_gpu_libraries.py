"""Libraries for GPUs that mlc_llm compiles through the plug-in.

Slow: compiling what TVM brings for attention and sampling takes mlc_llm most of a minute each.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_stub import StubMachine, can_be_built
from mlc_libraries import SIZES, built_by_mlc_llm, case, compiled
from mlc_steps import run_step

from mlcawq.build.compile import compile_model
from tests.build.mlc_plugin.emulated_library import run as run_driver
from tests.build.test_cuda_library import cuda_elf_files
from tests.graph.built_library import (
    Built,
    build_weights,
    check_batches_of_different_lengths,
    check_prefill_in_chunks_then_decode,
    error,
)
from tests.tir_kernels.cuda_emulator import why_not

pytestmark = [pytest.mark.mlc_llm, pytest.mark.slow]
HOST = {"kind": "llvm"}
_RUN = """
import sys
from pathlib import Path
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime
runtime = ModelRuntime(read_folder(Path(sys.argv[1])))
runtime.add_sequence(0)
runtime.prefill([(0, list(range(5)))])
runtime.prefill([(0, list(range(100)))])
for token in range(3):
    runtime.decode([0], [token])
"""


@pytest.fixture(scope="module")
def tiled(mlc_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A folder with weights in the tiled layout."""
    root = tmp_path_factory.mktemp("tiled")
    ours = build_weights(case("qwen3", 64), root)
    return built_by_mlc_llm(mlc_python, ours, root, "n16k64")


@pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")
@pytest.mark.parametrize(("arch", "capability"), [("sm_80", 86), ("sm_90", 90)])
def test_cuda_library_has_our_kernels(
    mlc_python: Path, tiled: Built, tmp_path: Path, arch: str, capability: int
) -> None:
    target = {"kind": "cuda", "arch": arch, "host": HOST}
    library = compiled(mlc_python, tiled, "lib-cuda.so", target)
    data = library.read_bytes()
    assert cuda_elf_files(data) == [int(arch[3:])]
    assert b"__global__" not in data
    assert b"dequantize" not in data
    answer = StubMachine(tmp_path).run(_RUN, tiled.folder, capability=capability, memory=2**30)
    assert answer.status == 0, answer.output
    launched = {call.name for call in answer.calls if call.what in ("launch", "captured")}
    for linear in ("256x512_g64", "256x256_g64", "256x1024_g64_silu", "512x256_g64"):
        # A kernel for one row, one for a few and one for many.
        kernels = {name for name in launched if f"w4a16_{linear}_kernel" in name}
        assert len(kernels) == 3, (linear, launched)
    assert not any("silu" in name and "w4a16" not in name for name in launched)
    assert ("graph", "launched") in {(call.what, call.name) for call in answer.calls}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_cuda_source_computes_what_our_cpu_library_does(
    mlc_python: Path, tiled: Built, tmp_path: Path
) -> None:
    target = {"kind": "cuda", "arch": "sm_90a", "host": HOST}
    script, out = Path(__file__).with_name("emulated_library.py"), tmp_path / "logits.npz"
    words = [str(mlc_python), str(script), str(tiled.folder), json.dumps(target), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = build_weights(tiled.case, tmp_path)
    path = compile_model(ours.config, tmp_path / "ours.so", "cpu:native", **SIZES).path
    expected = run_driver(replace(ours, library=path).driver())
    got = np.load(out)
    assert sorted(got) == sorted(expected)
    for name, logits in expected.items():
        assert error(got[name], logits) < 5e-3, name


def test_library_for_vulkan_computes_what_pytorch_does(mlc_python: Path, tiled: Built) -> None:
    from mlcawq.engine.devices import Missing, find_device

    device = find_device("vulkan")
    if isinstance(device, Missing):
        pytest.skip(f"no Vulkan device: {device.reason}")
    target = {"kind": "webgpu", "host": HOST}
    library = compiled(mlc_python, tiled, "lib-vulkan.so", target)
    built = replace(tiled, library=library, device=device.tvm)
    check_prefill_in_chunks_then_decode(built, (7, 300), 8)
    check_batches_of_different_lengths(built)


def test_weights_that_the_target_cannot_read_are_refused(mlc_python: Path, tiled: Built) -> None:
    for target, said in (
        ({"kind": "llvm", "host": HOST}, "the CPU has no kernels for weights in the layout n16k64"),
        ({"kind": "metal", "host": HOST}, "no kernels for target kind 'metal'"),
    ):
        words = ["compile", tiled.folder, "--device", json.dumps(target)]
        done = run_step(mlc_python, *words, "-o", tiled.folder / "lib.so", check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert said in done.stderr
        assert "--weight-layout autoawq" in done.stderr
    assert not (tiled.folder / "lib.so").exists()
