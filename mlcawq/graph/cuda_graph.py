"""CUDA graphs: what decode launches between two attention calls, launched as one.

Decoding a token launches hundreds of small kernels, and launching one takes the CPU about as long
as running one takes the GPU. TVM's RewriteCUDAGraph lifts sequences of launches whose tensors have
fixed places into functions that the virtual machine captures when they first run and replays from
then on (Relax, src/relax/transform/rewrite_cuda_graph.cc). Attention reads a cache that grows, so
it stays outside, and so does what reads a function's input or writes its result.
"""

from __future__ import annotations

from typing import Any

from mlcawq.graph._tvm import IRModule, relax, tvm

# Functions whose number of rows is a number of sequences: few different ones, each captured once.
_BATCHED = ("batch_decode", "batch_decode_to_last_hidden_states")
_ALLOC = "cuda_graph_alloc"  # the name that TVM's pass gives it
CUDA_GRAPH_CONFIG = {"relax.backend.use_cuda_graph": True}  # the pass does nothing without


def capture_cuda_graphs() -> Any:
    """The pass; it comes after memory is planned and before it is allocated.

    The module gains `cuda_graph_alloc_init`, which engines call once before anything else: it
    allocates the tensors of fixed places.
    """
    passes = [_capture_batches(), relax.transform.RewriteCUDAGraph(), _add_allocation()]
    return tvm.transform.Sequential(passes, name="CaptureCUDAGraphs")


def _capture_batches() -> Any:
    """Functions of batch_size are captured too, once for every value that they are called with."""

    @tvm.transform.module_pass(opt_level=0, name="CaptureBatches")
    def capture(module: IRModule, _context: Any) -> IRModule:
        for name, function in module.functions_items():
            if name.name_hint in _BATCHED and isinstance(function, relax.Function):
                module[name] = function.with_attr(
                    "relax.rewrite_cuda_graph.capture_symbolic_vars", ["batch_size"]
                )
        return module

    return capture


def _add_allocation() -> Any:
    @tvm.transform.module_pass(opt_level=0, name="AddCUDAGraphAllocation")
    def add(module: IRModule, _context: Any) -> IRModule:
        names = {variable.name_hint: variable for variable in module.get_global_vars()}
        if _ALLOC not in names:
            return module
        allocate = names[_ALLOC]
        bb = relax.BlockBuilder(module)
        with bb.function(f"{_ALLOC}_init", []):
            stored = bb.emit(
                relax.op.call_builtin_with_ctx(
                    "vm.builtin.cuda_graph.get_cached_alloc",
                    # The index under which the functions look for it: there is only this one.
                    [allocate, relax.prim_value(0)],
                    ty_args=module[allocate].ret_ty,
                )
            )
            bb.emit_func_output(stored)
        return bb.finalize()

    return add
