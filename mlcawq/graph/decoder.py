"""The decoder that llama, mistral, qwen2 and qwen3 share, under MLC's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.families import find_family
from mlcawq.graph._tvm import PagedKVCache, Target, nn, op
from mlcawq.graph.decode_block import single_launches
from mlcawq.graph.kv_cache import attention, slots_of
from mlcawq.graph.modules import (
    AWQLinear,
    DenseLinear,
    Embedding,
    HeadNorm,
    RMSNorm,
    RowPicker,
)
from mlcawq.graph.packed_tables import PackedEmbedding, PackedHead
from mlcawq.graph.settings import Quantization, quantized_linears
from tir_kernels.dispatch import kernels_for
from tir_kernels.layouts import TILED


class _Builder:
    """Makes the linears of a model, quantized where its checkpoint is."""

    def __init__(self, config: ModelConfig, quantization: Quantization, target: Target) -> None:
        self.config = config
        self.quantization = quantization
        self.target = target
        self.kernels = kernels_for(target)
        self.dtype = quantization.dtype
        self.quantized = quantized_linears(config)

    def is_quantized(self, name: str) -> bool:
        return self.quantization.group_size is not None and name in self.quantized

    def linear(self, name: str, K: int, N: int, bias: bool, silu: bool = False) -> nn.Module:
        if self.is_quantized(name):
            return AWQLinear(self.target, K, N, self.quantization, bias, silu)
        return DenseLinear(self.target, K, N, bias, self.dtype)

    def embedding(self) -> Embedding | PackedEmbedding:
        config, table = self.config, self.quantization.tables.embedding
        sizes = (config.vocab_size, config.hidden_size, self.dtype)
        if table is None:
            return Embedding(self.target, *sizes)
        return PackedEmbedding(self.target, table, *sizes)

    def head(self, tied: Embedding | PackedEmbedding | None) -> DenseLinear | PackedHead:
        """tied: the embedding, where the head is the same table."""
        config, table = self.config, self.quantization.tables.head
        hidden, vocabulary = config.hidden_size, config.vocab_size
        if table is None:
            assert not isinstance(tied, PackedEmbedding)  # tied tables are stored alike
            weight = None if tied is None else tied.weight
            return DenseLinear(
                self.target, hidden, vocabulary, False, self.dtype, "float32", weight
            )
        assert not isinstance(tied, Embedding)
        return PackedHead(self.target, table, vocabulary, hidden, self.dtype, tied)

    def norm(self) -> RMSNorm:
        config = self.config
        return RMSNorm(self.target, config.hidden_size, config.rms_norm_eps, self.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache, which also applies the rotation."""

    def __init__(self, build: _Builder, name: str) -> None:
        config = build.config
        self.q_heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.slots = slots_of(config, build.quantization)
        self.dtype = build.dtype
        q_size = self.q_heads * self.head_dim
        qkv_size = (self.q_heads + 2 * self.kv_heads) * self.head_dim
        # MLC's name of the fused linear, which differs from family to family.
        self.qkv = find_family(config).fused_name("self_attn.q_proj").rpartition(".")[2]
        qkv = build.linear(
            f"{name}.{self.qkv}", config.hidden_size, qkv_size, config.attention_bias
        )
        setattr(self, self.qkv, qkv)
        self.o_proj = build.linear(f"{name}.o_proj", q_size, config.hidden_size, config.o_bias)
        self.qk_norm = None
        if config.qk_norm:
            self.q_norm = HeadNorm(self.head_dim, self.dtype)
            self.k_norm = HeadNorm(self.head_dim, self.dtype)
            self.qk_norm = build.kernels.qk_norm(
                build.target,
                self.q_heads,
                self.kv_heads,
                self.head_dim,
                config.rms_norm_eps,
                self.dtype,
            )

    def forward(self, x: nn.Tensor, cache: PagedKVCache, layer: int) -> nn.Tensor:
        return self.o_proj(self.attend(self.project(x), cache, layer))

    def project(self, x: nn.Tensor) -> nn.Tensor:
        """[rows, hidden] -> queries, keys and values [rows, (q + 2 kv) d]."""
        return getattr(self, self.qkv)(x)

    def attend(self, qkv: nn.Tensor, cache: PagedKVCache, layer: int) -> nn.Tensor:
        """What `project` has made -> [rows, q d]; its keys and values are in the cache then."""
        if self.qk_norm is not None:
            out = nn.Tensor.placeholder(qkv.shape, self.dtype)
            weights = [self.q_norm.weight, self.k_norm.weight]
            qkv = op.tensor_ir_op(self.qk_norm, "qk_norm", [qkv, *weights], out)
        return attention(cache, layer, qkv, self.q_heads, self.kv_heads, self.slots)


class MLP(nn.Module):
    """SwiGLU. In the tiled layout gate and up are interleaved, for a linear that ends in silu."""

    def __init__(self, build: _Builder, name: str) -> None:
        config = build.config
        hidden, self.inner, self.dtype = config.hidden_size, config.intermediate_size, build.dtype
        gate_up = f"{name}.gate_up_proj"
        fused = build.is_quantized(gate_up) and build.quantization.weight_layout == TILED
        self.gate_up_proj = build.linear(gate_up, hidden, 2 * self.inner, config.mlp_bias, fused)
        self.down_proj = build.linear(f"{name}.down_proj", self.inner, hidden, config.mlp_bias)
        self.activate = None
        if not fused:
            self.activate = build.kernels.silu_multiply(build.target, self.inner, self.dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        inner = self.gate_up_proj(x)
        if self.activate is not None:
            out = nn.Tensor.placeholder((x.shape[0], self.inner), self.dtype)
            inner = op.tensor_ir_op(self.activate, "silu_multiply", [inner], out)
        return self.down_proj(inner)


class Layer(nn.Module):
    """One decoder block: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, build: _Builder, name: str) -> None:
        self.self_attn = Attention(build, f"{name}.self_attn")
        self.mlp = MLP(build, f"{name}.mlp")
        self.input_layernorm = build.norm()
        self.post_attention_layernorm = build.norm()


class Model(nn.Module):
    """Embedding, blocks and final norm. What a block adds is summed by the next norm's kernel."""

    def __init__(self, build: _Builder) -> None:
        config = build.config
        self.embed_tokens = build.embedding()
        self.layers = nn.ModuleList(
            [Layer(build, f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = build.norm()
        self.one_row = single_launches(build.target, self.layers, self.norm)

    def forward(
        self,
        x: nn.Tensor,
        cache: PagedKVCache,
        pick: Callable[[nn.Tensor], nn.Tensor] | None = None,
    ) -> nn.Tensor:
        """Embedded tokens [rows, hidden] -> normed hidden states [rows, hidden].

        pick: takes the rows that are wanted, if not all. Nothing reads what the last block's MLP
        would make of the others: their keys and values are cached by then.
        """
        if self.one_row is not None and x.shape[0] == 1:
            return self.one_row(x, cache)
        residual = x
        normed = self.layers[0].input_layernorm(x)
        for i, layer in enumerate(self.layers):
            out = layer.self_attn(normed, cache, i)
            last = i + 1 == len(self.layers)
            if last and pick is not None:
                out, residual = pick(out), pick(residual)
            residual, normed = layer.post_attention_layernorm.add(out, residual)
            out = layer.mlp(normed)
            norm = self.norm if last else self.layers[i + 1].input_layernorm
            residual, normed = norm.add(out, residual)
        return normed


class CausalLM(nn.Module):
    """A decoder with MLC's functions: shapes and names are what MLC's engine calls.

    Hidden states come in as [1, rows, hidden] (prefill) or [rows, 1, hidden] (decode).
    """

    def __init__(self, config: ModelConfig, quantization: Quantization, target: Target) -> None:
        build = _Builder(config, quantization, target)
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.dtype = quantization.dtype
        self.model = Model(build)
        self.take = RowPicker(target, config.hidden_size, quantization.dtype)
        # On CUDA a single row's MLP has a fixed shape and would be captured as a graph, in the
        # middle of a prefill whose other launches cannot be.
        self._picks_early = target.kind.name != "cuda"
        if config.tie_word_embeddings:
            # Not a submodule, so that parameters are exported once, under the embedding's name.
            self._head = [build.head(self.model.embed_tokens)]
        else:
            self.lm_head = build.head(None)
            self._head = [self.lm_head]

    def _hidden(
        self,
        embeds: nn.Tensor,
        cache: PagedKVCache,
        pick: Callable[[nn.Tensor], nn.Tensor] | None = None,
    ) -> nn.Tensor:
        b, s, hidden = embeds.shape
        return self.model(op.reshape(embeds, (b * s, hidden)), cache, pick)

    def _rows(
        self, embeds: nn.Tensor, cache: PagedKVCache, pick: Callable[[nn.Tensor], nn.Tensor]
    ) -> nn.Tensor:
        """The hidden states that `pick` takes."""
        if self._picks_early:
            return self._hidden(embeds, cache, pick)
        return pick(self._hidden(embeds, cache))

    def embed(self, input_ids: nn.Tensor) -> nn.Tensor:
        return self.model.embed_tokens(input_ids)

    def get_logits(self, hidden_states: nn.Tensor) -> nn.Tensor:
        return self._head[0](hidden_states)

    def batch_select_last_hidden_states(
        self, hidden_states: nn.Tensor, logit_positions: nn.Tensor
    ) -> nn.Tensor:
        return self.take(hidden_states, logit_positions)

    def prefill(self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        logits = self.get_logits(self._rows(input_embed, paged_kv_cache, self.take.last))
        return op.reshape(logits, (1, 1, self.vocab_size)), paged_kv_cache

    def decode(self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        logits = self.get_logits(self._hidden(input_embed, paged_kv_cache))
        return op.reshape(logits, (1, 1, self.vocab_size)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: nn.Tensor, logit_positions: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        def pick(rows: nn.Tensor) -> nn.Tensor:
            return self.take(rows, logit_positions)

        logits = self.get_logits(self._rows(input_embeds, paged_kv_cache, pick))
        batch = logit_positions.shape[0]
        return op.reshape(logits, (1, batch, self.vocab_size)), paged_kv_cache

    def batch_decode(self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        logits = self.get_logits(self._hidden(input_embeds, paged_kv_cache))
        return op.reshape(logits, (input_embeds.shape[0], 1, self.vocab_size)), paged_kv_cache

    def batch_verify(self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        logits = self.get_logits(self._hidden(input_embeds, paged_kv_cache))
        return op.reshape(logits, (1, input_embeds.shape[1], self.vocab_size)), paged_kv_cache

    def _to_hidden(self, embeds: nn.Tensor, cache: PagedKVCache) -> Any:
        return op.reshape(self._hidden(embeds, cache), embeds.shape), cache

    def prefill_to_last_hidden_states(
        self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        return self._to_hidden(input_embed, paged_kv_cache)

    def decode_to_last_hidden_states(
        self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        return self._to_hidden(input_embed, paged_kv_cache)

    def batch_prefill_to_last_hidden_states(
        self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        return self._to_hidden(input_embeds, paged_kv_cache)

    def batch_decode_to_last_hidden_states(
        self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        return self._to_hidden(input_embeds, paged_kv_cache)

    def batch_verify_to_last_hidden_states(
        self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        return self._to_hidden(input_embeds, paged_kv_cache)

    def spec(self) -> Any:
        """Every exported method with its arguments."""
        rows = ["seq_len"]
        cache = {"paged_kv_cache": nn.spec.Object(object_type=PagedKVCache)}

        def tensor(shape: list[Any], dtype: str | None = None) -> Any:
            return nn.spec.Tensor(shape, dtype or self.dtype)

        one = {"input_embed": tensor([1, "seq_len", self.hidden_size])}
        step = {"input_embed": tensor([1, 1, self.hidden_size])}
        many = {"input_embeds": tensor([1, "seq_len", self.hidden_size])}
        steps = {"input_embeds": tensor(["batch_size", 1, self.hidden_size])}
        positions = {"logit_positions": tensor(["batch_size"], "int32")}
        hidden = {"hidden_states": tensor(["seq_len", self.hidden_size])}
        arguments: dict[str, dict[str, Any]] = {
            "embed": {"input_ids": tensor(rows, "int32")},
            "get_logits": hidden,
            "batch_select_last_hidden_states": {**hidden, **positions},
            "prefill": {**one, **cache},
            "decode": {**step, **cache},
            "batch_prefill": {**many, **positions, **cache},
            "batch_decode": {**steps, **cache},
            "batch_verify": {**many, **cache},
            "prefill_to_last_hidden_states": {**one, **cache},
            "decode_to_last_hidden_states": {**step, **cache},
            "batch_prefill_to_last_hidden_states": {**many, **cache},
            "batch_decode_to_last_hidden_states": {**steps, **cache},
            "batch_verify_to_last_hidden_states": {**many, **cache},
        }
        raw = {}
        for name, values in arguments.items():
            weightless = name == "batch_select_last_hidden_states"
            mode = {"param_mode": "none" if weightless else "packed", "effect_mode": "none"}
            raw[name] = {**values, "$": mode}
        return nn.spec.ModuleSpec.from_raw(raw, self)
