"""Creating TVM's paged KV cache: its bookkeeping is the runtime's, the kernels are handed in."""

from __future__ import annotations

from typing import Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.graph._tvm import IRModule, PrimFunc, RopeMode, Target, relax, tirx, tvm_kernels
from mlcawq.graph.rope import inverse_frequencies
from mlcawq.graph.settings import Quantization
from tir_kernels.dispatch import kernels_for


def add_kv_cache_creation(
    module: IRModule, config: ModelConfig, quantization: Quantization, target: Target
) -> IRModule:
    """`module` with MLC's function create_tir_paged_kv_cache.

    It takes five shapes of one element: max_batch_size, max_total_seq_len, prefill_chunk_size,
    page_size (16, which the kernels are compiled for) and support_sliding_window (0).
    """
    q_heads, kv_heads, d = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    sizes_of = (q_heads, kv_heads, d)
    dtype = quantization.dtype
    kernels = kernels_for(target)
    frequencies, scale = inverse_frequencies(config)
    bb = relax.BlockBuilder(module)

    def kernel(function: PrimFunc, name: str) -> Any:
        return bb.add_func(function, name)

    def tir(function: PrimFunc, name: str) -> Any:
        return relax.Tuple([relax.StringImm("tirx"), kernel(function, name)])

    names = (
        "max_batch_size",
        "max_total_seq_len",
        "prefill_chunk_size",
        "page_size",
        "support_sliding_window",
    )
    sizes = [tirx.Var(name, "int64") for name in names]
    params = [
        relax.Var(f"{name}_", relax.ShapeType([size]))
        for name, size in zip(names, sizes, strict=True)
    ]
    layers = config.num_hidden_layers
    # Trees of tokens, which MLC's engine can speculate with, have kernels for CPUs only: TVM's for
    # GPUs take more shared memory than WebGPU promises, and the cache does without them.
    if target.kind.name == "llvm":
        # TVM 0.26's own list for CPUs has these two the other way round.
        tree_attention = [
            tir(
                tvm_kernels.tree_attn_with_paged_kv_cache_cpu(kv_heads, q_heads, d, dtype, {}),
                "attention_tree_paged",
            ),
            tir(tvm_kernels.tree_attn_cpu(kv_heads, q_heads, d, dtype, {}), "attention_tree"),
        ]
        compact = tvm_kernels._compact_kv_copy_cpu(kv_heads, d, dtype)
    else:
        tree_attention = [relax.Tuple([]), relax.Tuple([])]
        compact = kernels.move_slots(target, kv_heads, d, dtype)
    with bb.function("create_tir_paged_kv_cache", params=params):
        arguments = [
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, layers]),
            relax.prim_value(q_heads),
            relax.prim_value(kv_heads),
            relax.prim_value(d),
            relax.prim_value(d),
            relax.ShapeExpr([int(tvm_kernels.AttnKind.MHA)] * layers),
            relax.prim_value(False),
            relax.prim_value(RopeMode.NORMAL),
            relax.prim_value(1),
            relax.prim_value(config.rope.theta),
            relax.const(frequencies),
            relax.op.zeros((), dtype),
            kernel(kernels.append_to_pages(target, kv_heads, d, dtype), "kv_cache_append"),
            relax.prim_value(0),  # appending for latent attention
            tir(kernels.attention_prefill_ragged(target, *sizes_of, dtype), "attention_ragged"),
            tir(kernels.attention_prefill_paged(target, *sizes_of, dtype), "attention_paged"),
            tir(kernels.attention_decode_paged(target, *sizes_of, dtype), "attention_decode"),
            relax.Tuple([]),  # prefill and decode in a sliding window
            relax.Tuple([]),
            *tree_attention,
            relax.Tuple([]),  # latent attention
            relax.Tuple([kernel(kernels.merge_state(target, q_heads, d, dtype), "merge_state")]),
            kernel(
                kernels.split_rotary(target, q_heads, kv_heads, d, dtype, scale), "split_rotary"
            ),
            kernel(kernels.copy_page(target, kv_heads, d, dtype), "kv_cache_copy_page"),
            kernel(kernels.read_slots(target, layers, kv_heads, d, dtype), "kv_cache_debug_get_kv"),
            kernel(compact, "kv_cache_compact"),
        ]
        cache = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType()
        )
        bb.emit_func_output(bb.emit(cache))
    return bb.finalize()
