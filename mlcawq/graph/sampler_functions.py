"""How MLC's engine draws tokens on a GPU, and keeps what a draft model proposes."""

from __future__ import annotations

from typing import Any

from mlcawq.graph._tvm import IRModule, Target, relax, tirx
from tir_kernels.dispatch import kernels_for

# Types of tensors: the sizes' names, and the type of elements.
_ROWS = (("b", "vocab_size"), "float32")
_SORTED = (("b", "vocab_size"), "int32")
_ROW_EACH = (("b",), "float32")
_DRAW_EACH = (("n",), "float32")
_DRAW_ID = (("n",), "int32")
_PLACE_EACH = (("m",), "float32")
_PLACE_ID = (("m",), "int32")

# The engine's GPU sampler exists for CUDA and for TVM's own Vulkan; elsewhere it copies the
# probabilities to the processor. Arguments have MLC's names and order.
_SAMPLER: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "multinomial_from_uniform": (
        {"probs": _ROWS, "uniform_samples": _DRAW_EACH, "sample_indices": _DRAW_ID},
        (_DRAW_ID,),
    ),
    "argsort_probs": ({"probs": _ROWS}, (_ROWS, _SORTED)),
    "sample_with_top_p": (
        {
            "sorted_probs": _ROWS,
            "sorted_indices": _SORTED,
            "uniform_samples": _DRAW_EACH,
            "sample_indices": _DRAW_ID,
            "top_p": _ROW_EACH,
        },
        (_DRAW_ID,),
    ),
    "sampler_take_probs": (
        {
            "unsorted_probs": _ROWS,
            "sorted_indices": _SORTED,
            "sample_indices": _DRAW_ID,
            "sampling_results": _DRAW_ID,
            "top_prob_offsets": _PLACE_ID,
        },
        (_DRAW_EACH, _PLACE_EACH, _PLACE_ID),
    ),
    "renormalize_by_top_p": (
        {"probs": _ROWS, "top_p": _ROW_EACH, "init_pivots": (("b", 3), "float32")},
        (_ROWS,),
    ),
}


def add_sampler_functions(module: IRModule, target: Target) -> IRModule:
    """For GPUs, the kernels of `tir_kernels.gpu.sampling` and `sorting` under their names, as
    functions that return what the kernels put into their last arguments.
    """
    if target.kind.name == "llvm":
        return module
    kernels = kernels_for(target)
    bb = relax.BlockBuilder(module)
    for name, (arguments, results) in _SAMPLER.items():
        sizes = {size: tirx.Var(size, "int64") for size in ("b", "vocab_size", "n", "m")}
        params = [relax.Var(key, _tensor(type_, sizes)) for key, type_ in arguments.items()]
        types = [_tensor(type_, sizes) for type_ in results]
        kernel = bb.add_func(getattr(kernels, name)(target), f"{name}_kernel")
        with bb.function(name, params):
            returned = types if len(types) > 1 else types[0]
            bb.emit_func_output(bb.emit(relax.call_tir(kernel, params, returned)))
    return bb.finalize()


def _tensor(type_: Any, sizes: dict[str, Any]) -> Any:
    shape, dtype = type_
    return relax.TensorType([sizes.get(size, size) for size in shape], dtype)


def add_draft_functions(module: IRModule, target: Target, dtype: str) -> IRModule:
    """gather_* (table [n, k], rows [m], out [m, k]) and scatter_* (x [m, k], rows [m], out [n, k])
    for probabilities, which are float32, and for hidden states, which are `dtype`.
    """
    kernels = kernels_for(target)
    for what, kind in (("probs", "float32"), ("hidden_states", dtype)):
        for verb, factory in (("gather", kernels.gather_rows), ("scatter", kernels.scatter_rows)):
            name = f"{verb}_{what}"
            module[name] = factory(target, kind).with_attr("global_symbol", name)
    return module
