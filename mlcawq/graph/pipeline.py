"""From a decoder's module to a compiled library: the passes, and MLC's metadata on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlcawq.checkpoint.config import ModelConfig, computed_settings
from mlcawq.families import find_family
from mlcawq.graph._tvm import IRModule, PrimFunc, Target, nn, relax, tirx, tvm, vm_build
from mlcawq.graph.cuda_graph import CUDA_GRAPH_CONFIG, capture_cuda_graphs
from mlcawq.graph.decoder import CausalLM
from mlcawq.graph.kv_cache import add_kv_cache_creation, slots_of
from mlcawq.graph.logit_functions import add_embedding_allocation, add_logit_functions
from mlcawq.graph.sampler_functions import add_draft_functions, add_sampler_functions
from mlcawq.graph.settings import CompileSettings, Quantization
from tir_kernels.cpu.slots import Slots
from tir_kernels.foreign import with_root_block

# TIR passes that take half of the compile time and find nothing to do: kernels come scheduled, with
# buffers of their exact size, and have neither permuted layouts nor virtual threads.
_IDLE_PASSES = (
    "s_tir.CompactBufferAllocation",
    "s_tir.HoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
)

Parameters = list[tuple[str, nn.Parameter]]


def build_module(
    config: ModelConfig, quantization: Quantization, settings: CompileSettings, target: Target
) -> tuple[IRModule, dict[str, Any]]:
    """Every function of the library, before optimization, and its metadata."""
    model = CausalLM(config, quantization, target)
    module, parameters = model.export_tvm(spec=model.spec())
    module = add_kv_cache_creation(module, config, quantization, target)
    module = add_logit_functions(module, target)
    module = add_sampler_functions(module, target)
    module = add_draft_functions(module, target, quantization.dtype)
    module = add_embedding_allocation(module, settings, config.hidden_size, quantization.dtype)
    return module, library_metadata(config, quantization, settings, parameters)


def library_metadata(
    config: ModelConfig,
    quantization: Quantization,
    settings: CompileSettings,
    parameters: Parameters,
) -> dict[str, Any]:
    """What `_metadata` tells an engine: MLC's keys, the layout of the weights, and what else the
    code was compiled for ("architecture").
    """
    return {
        "model_type": find_family(config).mlc_model_type,
        "quantization": quantization.name,
        "weight_layout": quantization.weight_layout,
        **quantization.names(),
        "architecture": computed_settings(config),
        "context_window_size": settings.context_window_size,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": settings.prefill_chunk_size,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": settings.max_batch_size,
        "active_vocab_size": None,
        "model_task": "chat",
        "kv_cache": {
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            **_slot_bytes(slots_of(config, quantization)),
        },
        "params": [
            {
                "name": name,
                "shape": [int(size) for size in parameter.shape],
                "dtype": str(parameter.dtype),
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for name, parameter in parameters
        ],
    }


def _slot_bytes(slots: Slots) -> dict[str, int]:
    """What a key or value takes, where the head's width and type do not tell."""
    return {} if slots.stored is None else {"slot_bytes": slots.nbytes}


def compile_module(
    module: IRModule, settings: CompileSettings, target: Target, metadata: dict[str, Any]
) -> Any:
    """Run the passes and generate code; returns TVM's executable, ready to be exported.

    metadata: as for `lower_module`.
    """
    lowered = lower_module(module, settings, target, metadata)
    with compiling(target):
        return tvm.compile(lowered, target=target, relax_pipeline=None)


def bytecode_of(lowered: IRModule, target: Target) -> Any:
    """TVM's executable for the graph alone; who exports it adds what it calls."""
    builder = relax.ExecBuilder()
    with compiling(target):
        vm_build._vmcodegen(builder, lowered)
        return vm_build._vmlink(builder, target)


def lower_module(
    module: IRModule, settings: CompileSettings, target: Target, metadata: dict[str, Any]
) -> IRModule:
    """Relax's passes: what is left are kernels, and a graph that the virtual machine can run.

    metadata gains "memory_usage": the bytes that each function plans for its intermediate tensors
    at the upper bounds of `settings`.
    """
    transform = relax.transform
    bounds = {
        "seq_len": settings.prefill_chunk_size,
        "batch_size": settings.max_batch_size,
        "total_seq_len": settings.context_window_size,
    }
    on_cuda = target.kind.name == "cuda"
    passes = [
        _attach_planning_bounds(bounds),
        _give_root_blocks(),
        tvm.tirx.transform.BindTarget(target),
        transform.LegalizeOps(),
        transform.FoldConstant(),
        # Nothing is fused: kernels come whole, and reshapes become views, not copies.
        transform.RewriteDataflowReshape(),
        transform.DeadCodeElimination(),
        *([] if target.kind.name == "llvm" else [_require_schedules()]),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        _attach_metadata(metadata),
        *([capture_cuda_graphs()] if on_cuda else []),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    with compiling(target):
        return tvm.transform.Sequential(passes)(module)


@contextmanager
def compiling(target: Target) -> Iterator[None]:
    """In what passes are run and code is generated for `target`; of this thread alone."""
    config = CUDA_GRAPH_CONFIG if target.kind.name == "cuda" else {}
    with target, tvm.transform.PassContext(config=config, disabled_pass=list(_IDLE_PASSES)):
        yield


def _attach_planning_bounds(bounds: dict[str, int]) -> Any:
    """Upper bounds of symbolic sizes: with them, memory is planned once and reused."""

    @tvm.transform.module_pass(opt_level=0, name="AttachPlanningBounds")
    def attach(module: IRModule, _context: Any) -> IRModule:
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                module[name] = (
                    function.with_attr("tir_var_upper_bound", bounds)
                    .with_attr("tir_non_negative_var", ["vocab_size"])
                    .with_attr("relax.memory_plan_dynamic_func_output", True)
                )
        return module

    return attach


def _give_root_blocks() -> Any:
    """Kernels written as plain loops get the root block that Relax's analyses ask for."""

    @tvm.transform.module_pass(opt_level=0, name="GiveRootBlocks")
    def give(module: IRModule, _context: Any) -> IRModule:
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc):
                module[name] = with_root_block(function)
        return module

    return give


def _require_schedules() -> Any:
    """Refuses kernels without threads: they would run on the host, with pointers of the device."""

    @tvm.transform.module_pass(opt_level=0, name="RequireSchedules")
    def check(module: IRModule, _context: Any) -> IRModule:
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc) and not function.attrs.get("tirx.is_scheduled"):
                raise ValueError(f"{name.name_hint} is not scheduled for a GPU")
        return module

    return check


def _attach_metadata(metadata: dict[str, Any]) -> Any:
    """Add the function `_metadata` with the metadata as JSON, memory plan included."""

    @tvm.transform.module_pass(opt_level=0, name="AttachMetadata")
    def attach(module: IRModule, _context: Any) -> IRModule:
        metadata["memory_usage"] = {
            name.name_hint: _planned_bytes(function)
            for name, function in module.functions_items()
            if isinstance(function, relax.Function)
        }
        bb = relax.BlockBuilder(module)
        with bb.function("_metadata", []):
            bb.emit_func_output(relax.StringImm(json.dumps(metadata)))
        return bb.finalize()

    return attach


def _planned_bytes(function: Any) -> int:
    """The storage that a planned function allocates, where its size is known."""
    alloc_storage = tvm.ir.Op.get("relax.memory.alloc_storage")
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and node.op == alloc_storage:
            size = node.args[0].values[0]
            if isinstance(size, tirx.IntImm):
                total += size.value

    relax.analysis.post_order_visit(function, visit)
    return total
