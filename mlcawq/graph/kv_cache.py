"""Creating TVM's paged KV cache: its bookkeeping is the runtime's, the kernels are handed in."""

from __future__ import annotations

from typing import Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.graph._tvm import (
    IRModule,
    PagedKVCache,
    PrimFunc,
    RopeMode,
    Target,
    nn,
    op,
    relax,
    tirx,
    tvm_kernels,
)
from mlcawq.graph.rope import inverse_frequencies
from mlcawq.graph.settings import Quantization
from tir_kernels.cpu.slots import Slots
from tir_kernels.dispatch import kernels_for


def slots_of(config: ModelConfig, quantization: Quantization) -> Slots:
    """How the cache keeps keys and values."""
    return Slots(config.head_dim, quantization.dtype, quantization.roundings.stored)


def attention(
    cache: PagedKVCache, layer: int, qkv: nn.Tensor, q_heads: int, kv_heads: int, slots: Slots
) -> nn.Tensor:
    """qkv [rows, (q + 2 kv heads) d], not yet rotated -> [rows, q heads d]; its keys and values are
    in the cache then.
    """
    rows, d, seen = qkv.shape[0], slots.head_dim, slots.heads(q_heads)
    # Where these are not the real heads, they are at the beginning of the real ones' memory.
    within = op.reshape if slots.stored is None else _beginning
    qkv = within(qkv, (1, rows, seen + 2 * kv_heads, slots.size))
    attended = cache.attention_with_fused_qkv(layer, qkv, seen, sm_scale=d**-0.5)
    return within(attended, (rows, q_heads * d))


def _beginning(x: nn.Tensor, shape: tuple[Any, ...]) -> nn.Tensor:
    """x's memory from its start on, in a shape of no more elements."""
    found = nn.core.wrap_nested(relax.op.memory.view(x._expr, shape), "view")
    assert isinstance(found, nn.Tensor)
    return found


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
    slots = slots_of(config, quantization)
    # Other targets' kernels keep keys and values as they are, and are not asked.
    stored: dict[str, Any] = {} if slots.stored is None else {"stored": slots.stored}
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
    # Trees of tokens, which MLC's engine can speculate with, have TVM's kernels for CPUs only, and
    # for keys and values as they are: those for GPUs take more shared memory than WebGPU promises.
    # The cache does without them.
    tree_attention = [relax.Tuple([]), relax.Tuple([])]
    if target.kind.name == "llvm" and slots.stored is None:
        # TVM 0.26's own list for CPUs has these two the other way round.
        paged = tvm_kernels.tree_attn_with_paged_kv_cache_cpu(kv_heads, q_heads, d, dtype, {})
        tree = tvm_kernels.tree_attn_cpu(kv_heads, q_heads, d, dtype, {})
        tree_attention = [tir(paged, "attention_tree_paged"), tir(tree, "attention_tree")]
    ragged = kernels.attention_prefill_ragged(target, *sizes_of, dtype, **stored)
    paged = kernels.attention_prefill_paged(target, *sizes_of, dtype, **stored)
    decode = kernels.attention_decode_paged(target, *sizes_of, dtype, **stored)
    merge = kernels.merge_state(target, q_heads, d, dtype, **stored)
    split = kernels.split_rotary(target, *sizes_of, dtype, scale, **stored)
    append = kernels.append_to_pages(target, kv_heads, d, dtype, **stored)
    copy = kernels.copy_page(target, kv_heads, d, dtype, **stored)
    read = kernels.read_slots(target, layers, kv_heads, d, dtype, **stored)
    move = kernels.move_slots(target, kv_heads, d, dtype, **stored)
    with bb.function("create_tir_paged_kv_cache", params=params):
        arguments = [
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, layers]),
            relax.prim_value(slots.heads(q_heads)),
            relax.prim_value(kv_heads),
            relax.prim_value(slots.size),
            relax.prim_value(slots.size),
            relax.ShapeExpr([int(tvm_kernels.AttnKind.MHA)] * layers),
            relax.prim_value(False),
            relax.prim_value(RopeMode.NORMAL),
            relax.prim_value(1),
            relax.prim_value(config.rope.theta),
            relax.const(frequencies),
            relax.op.zeros((), dtype),
            kernel(append, "kv_cache_append"),
            relax.prim_value(0),  # appending for latent attention
            tir(ragged, "attention_ragged"),
            tir(paged, "attention_paged"),
            tir(decode, "attention_decode"),
            relax.Tuple([]),  # prefill and decode in a sliding window
            relax.Tuple([]),
            *tree_attention,
            relax.Tuple([]),  # latent attention
            relax.Tuple([kernel(merge, "merge_state")]),
            kernel(split, "split_rotary"),
            kernel(copy, "kv_cache_copy_page"),
            kernel(read, "kv_cache_debug_get_kv"),
            kernel(move, "kv_cache_compact"),
        ]
        cache = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType()
        )
        bb.emit_func_output(bb.emit(cache))
    return bb.finalize()
