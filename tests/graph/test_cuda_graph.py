"""What is captured of a decode function, seen in what TVM's own runtime launches (stub driver)."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from cuda_stub import StubMachine, can_be_built
from cuda_stub.kernels import add_one
from tvm import relax

from mlcawq.build.cuda_compiler import find_cuda_compiler
from mlcawq.build.cuda_library import export_cuda_library, keeping_cuda_source
from mlcawq.build.cuda_target import cuda_target
from mlcawq.graph.cuda_graph import CUDA_GRAPH_CONFIG, capture_cuda_graphs

pytestmark = pytest.mark.skipif(not can_be_built(), reason="the stub driver is for Linux with gcc")

_RUN = """
import sys
from mlcawq.engine.runtime_only import import_tvm_runtime
import_tvm_runtime()
import numpy as np, tvm
from mlcawq.engine.cuda_runtime import load_cuda_runtime
load_cuda_runtime()
vm = tvm.runtime.load_module(sys.argv[1])["vm_load_executable"]()
gpu = tvm.device("cuda", 0)
vm["vm_initialization"](gpu.dlpack_device_type(), 0, 2, 1, 0, 2)
vm["cuda_graph_alloc_init"]()
for rows in map(int, sys.argv[2:]):
    vm["batch_decode"](tvm.runtime.tensor(np.ones((rows, 256), "float16"), device=gpu))
"""


def export(path: Path) -> None:
    """batch_decode(x [batch_size, 256]) = x + 4, one kernel after another."""
    bb = relax.BlockBuilder()
    rows = tvm.tirx.Var("batch_size", "int64")
    x = relax.Var("x", relax.TensorType([rows, 256], "float16"))
    kernel = bb.add_func(add_one, "add_one")
    with bb.function("batch_decode", [x]):
        out = x
        for _ in range(4):
            out = bb.emit(relax.call_tir(kernel, [out], relax.TensorType([rows, 256], "float16")))
        bb.emit_func_output(out)
    module = bb.get()
    bounds = {"batch_size": 4}
    module["batch_decode"] = module["batch_decode"].with_attr("tir_var_upper_bound", bounds)
    transform = relax.transform
    passes = [
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        capture_cuda_graphs(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    target = cuda_target("cuda:sm_80")
    with keeping_cuda_source(), target, tvm.transform.PassContext(config=CUDA_GRAPH_CONFIG):
        executable = tvm.compile(
            module, target=target, relax_pipeline=tvm.transform.Sequential(passes)
        )
    export_cuda_library(executable.mod, path, "sm_80", find_cuda_compiler("sm_80"), "g++")


def test_a_batch_is_captured_once_for_every_size(tmp_path: Path) -> None:
    library = tmp_path / "lib-cuda.so"
    export(library)
    answer = StubMachine(tmp_path).run(_RUN, library, 1, 1, 1, 3, 1, capability=80)
    assert answer.status == 0, answer.output
    # The first kernel reads the input and the last writes the result: two between them.
    assert [call.numbers[0] for call in answer.calls if call.name == "instantiated"] == [2, 2]
    # Replayed: the second and third call with one row, and the last.
    assert [call.numbers[0] for call in answer.calls if call.name == "launched"] == [2, 2, 2]
    grids = [call.numbers[0] for call in answer.named("launch")]
    assert grids == [*(1, 1, 1, 1), *(1, 1), *(1, 1), *(3, 3, 3, 3), *(1, 1)]
