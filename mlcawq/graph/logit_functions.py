"""The functions beside the model that MLC's engine looks for in a library."""

from __future__ import annotations

from typing import Any

from mlcawq.graph._tvm import IRModule, Target, relax, tirx
from mlcawq.graph.settings import CompileSettings
from tir_kernels.dispatch import kernels_for


def add_logit_functions(module: IRModule, target: Target) -> IRModule:
    """softmax_with_temperature ([b, 1, V], [b]) and the three apply_*_inplace functions."""
    kernels = kernels_for(target)
    bb = relax.BlockBuilder(module)
    batch, vocab = tirx.Var("batch_size", "int64"), tirx.Var("vocab_size", "int64")
    logits = relax.Var("logits", relax.TensorType([batch, 1, vocab], "float32"))
    temperature = relax.Var("temperature", relax.TensorType([batch], "float32"))
    with bb.function("softmax_with_temperature", [logits, temperature]):
        # Views by hand: TVM makes a copying kernel of a reshape whose result leaves the function.
        flat = _view(bb, logits, [batch, vocab])
        kernel = bb.add_func(kernels.softmax_with_temperature(target), "softmax")
        type_ = relax.TensorType([batch, vocab], "float32")
        probabilities = bb.emit(relax.call_tir(kernel, [flat, temperature], type_))
        bb.emit_func_output(_view(bb, probabilities, [batch, 1, vocab]))
    module = bb.finalize()
    for function in (
        kernels.apply_logit_bias_inplace,
        kernels.apply_penalty_inplace,
        kernels.apply_bitmask_inplace,
    ):
        name = function.__name__
        module[name] = function(target).with_attr("global_symbol", name)
    return module


def _view(bb: relax.BlockBuilder, tensor: relax.Var, shape: list[Any]) -> relax.Var:
    type_ = relax.TensorType(shape, "float32")
    view = relax.call_pure_packed(
        "vm.builtin.reshape", tensor, relax.ShapeExpr(shape), ty_args=type_
    )
    return bb.emit(view)


def add_embedding_allocation(
    module: IRModule, settings: CompileSettings, hidden_size: int, dtype: str
) -> IRModule:
    """alloc_embedding_tensor() -> uninitialized [prefill_chunk_size, hidden]."""
    bb = relax.BlockBuilder(module)
    with bb.function("alloc_embedding_tensor", []):
        shape = relax.ShapeExpr([settings.prefill_chunk_size, hidden_size])
        tensor = relax.op.builtin.alloc_tensor(
            shape, relax.DataTypeImm(dtype), runtime_device_index=0
        )
        bb.emit_func_output(bb.emit(tensor))
    return bb.finalize()
