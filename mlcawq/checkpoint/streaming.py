"""A checkpoint run one decoder block at a time.

The layers are transformers' own, built on the meta device: they cost nothing until a block's
tensors are read, and a block is gone when its caller drops it. What each layer is called with
(rotary embedding, masks, sliding windows) is found by running the model's own forward over
recorders, so that it stays right for every rope type, layer type and transformers release.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mlcawq.checkpoint.config import ModelConfig, read_config
from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, raise_all
from mlcawq.families import expected_tensors, find_family
from tir_kernels.layouts import SYMMETRIC_ZEROS
from tir_kernels.reference import dequantize

_ALWAYS_STORED = ("qweight", "scales")

_HEAD_BYTES = 128 * 2**20  # of head weights held in the compute type at a time
_PLANS_KEPT = 8


class StreamedModel:
    """Any Hugging Face folder of a known family (fp16, bf16, fp32, or AWQ, dequantized).

    folder: checkpoint folder with config.json and safetensors.
    dtype: type that everything is computed in.
    attention: transformers' attention implementation, "sdpa" or "eager".

    Raises UserError naming every tensor that is missing, unexpected or of the wrong shape.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        self.config = read_config(self.folder)
        self.family = find_family(self.config)
        self.num_blocks = self.config.num_hidden_layers
        self.reader = TensorReader(self.folder)
        raise_all(tensor_problems(self.config, self.reader))

        model = skeleton(self.config, attention)
        layers = model.get_submodule(self.family.block.rpartition(".")[0])
        assert isinstance(layers, nn.ModuleList)
        self._layers = list(layers)
        self._norm = model.get_submodule(self.family.final_norm)
        for i, layer in enumerate(self._layers):
            layers[i] = _Recorder(layer)
        self._recorders = layers
        self._base = model.base_model
        _, _, norm = self.family.final_norm.rpartition(".")
        setattr(self._base, norm, nn.Identity())
        rotary = self._base.rotary_emb
        self._base.rotary_emb = type(rotary)(config=model.config)
        self._plans: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    # Tensors

    def block_name(self, i: int) -> str:
        """Name of decoder block i in the checkpoint ("model.layers.3")."""
        return self.family.block.format(i)

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of that full name is stored as AWQ."""
        return f"{linear}.qweight" in self.reader

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its unquantized name, in the compute type; AWQ weights dequantized."""
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and self.is_quantized(prefix):
            qweight, scales = (self.reader.numpy(f"{prefix}.{part}") for part in _ALWAYS_STORED)
            zeros = f"{prefix}.qzeros"
            if zeros in self.reader:
                qzeros = self.reader.numpy(zeros)
            else:
                qzeros = np.full((scales.shape[0], qweight.shape[1]), SYMMETRIC_ZEROS, np.int32)
            weight = dequantize(qweight, qzeros, scales, np.float32)
            return torch.from_numpy(weight).T.contiguous().to(self.dtype)
        return self.reader.torch(name).to(self.dtype)

    def block(self, i: int) -> nn.Module:
        """Decoder block i with its weights, in eval mode. The caller owns it."""
        return self._filled(self._layers[i], self.block_name(i))

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        module = copy.deepcopy(module)
        state = {name: self.tensor(f"{prefix}.{name}") for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    # Running

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> hidden states [B, T, hidden_size]."""
        return self.reader.torch_rows(f"{self.family.embedding}.weight", ids).to(self.dtype)

    @torch.no_grad()
    def layer_arguments(self, i: int, batch: int, tokens: int) -> dict[str, Any]:
        """What the model calls layer i with, beside the hidden states, for [batch, tokens]."""
        key = (batch, tokens)
        if key not in self._plans:
            inputs = torch.zeros(batch, tokens, self.config.hidden_size, dtype=self.dtype)
            self._base(inputs_embeds=inputs, use_cache=False)
            self._plans[key] = [recorder.take() for recorder in self._recorders]
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key][i]

    @torch.no_grad()
    def run_block(self, block: nn.Module, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, hidden_size] through `block`, called as layer i is."""
        output = block(hidden, **self.layer_arguments(i, *hidden.shape[:2]))
        return output[0] if isinstance(output, tuple) else output

    def hidden_states(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids [B, T] each -> last hidden states before the final norm, [B, T, hidden]."""
        states = [self.embed(ids) for ids in batches]
        for i in range(self.num_blocks):
            block = self.block(i)
            for j, hidden in enumerate(states):
                states[j] = self.run_block(block, i, hidden)
        return states

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden_size] -> float32 logits [..., vocab_size].

        The final norm is applied. The head is read in slices of the vocabulary, so that a large
        one is never copied whole into the compute type.
        """
        hidden = self._filled(self._norm, self.family.final_norm)(hidden)
        tied = self.config.tie_word_embeddings
        source = self.family.embedding if tied else self.family.head
        weight = self.reader.torch(f"{source}.weight")
        logits = torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32)
        rows = max(1, _HEAD_BYTES // (weight.shape[1] * self.dtype.itemsize))
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows].to(self.dtype)
            logits[..., start : start + rows] = hidden @ part.T
        return logits

    def iter_logits(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Logits of `batches` one after another: only one batch's are in memory.

        batches: token ids [B, T] each, unpadded. Yields float32 [B, T, vocab_size].
        """
        states = self.hidden_states(batches)
        for j in range(len(states)):
            hidden, states[j] = states[j], states[j][:0]
            yield self.head(hidden)

    def logits(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As `iter_logits`, all at once: B*T*vocab_size*4 bytes a batch."""
        return list(self.iter_logits(batches))


class _Recorder(nn.Module):
    """Stands for a layer in the model's forward and notes what it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some releases pick the mask by an attribute of the layer.
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self._arguments: dict[str, Any] | None = None

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> Any:
        self._arguments = arguments
        # Releases before 4.54 index the layer's result, later ones take it as it is.
        return (hidden,) if _layers_return_tuples() else hidden

    def take(self) -> dict[str, Any]:
        assert self._arguments is not None
        arguments, self._arguments = self._arguments, None
        return arguments


def _layers_return_tuples() -> bool:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return (major, minor) < (4, 54)


def skeleton(given: ModelConfig, attention: str = "sdpa") -> Any:
    """The causal LM of transformers with every parameter on the meta device.

    Its rotary buffers are there too, without content: who runs it makes that module anew.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = portable_config(given)
    # Types and storage are ours to decide; everything else is transformers' business.
    for key in ("quantization_config", "torch_dtype", "dtype", "model_type"):
        raw.pop(key, None)
    config = AutoConfig.for_model(given.model_type, **raw)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tensor_problems(config: ModelConfig, reader: TensorReader) -> Iterator[Problem]:
    """Every tensor that is missing, unexpected or of the wrong shape, by the headers alone."""
    expected, family = expected_tensors(config), find_family(config)
    quantization = config.quantization
    linears = {
        f"{family.block.format(i)}.{linear}"
        for i in range(config.num_hidden_layers)
        for linear in family.linears
    }
    known = set(expected)
    for name, shape in expected.items():
        prefix, _, kind = name.rpartition(".")
        stored_awq = f"{prefix}.qweight" in reader
        if quantization and kind == "weight" and prefix in linears and stored_awq:
            n, k = shape
            groups = k // quantization.group_size
            parts: dict[str, tuple[int, ...]] = {
                "qweight": (k, n // 8),
                "qzeros": (groups, n // 8),
                "scales": (groups, n),
            }
            if not quantization.zero_point and f"{prefix}.qzeros" not in reader:
                del parts["qzeros"]
        else:
            parts = {kind: shape}
        for part, wanted in parts.items():
            full = f"{prefix}.{part}"
            known.add(full)
            if full not in reader:
                yield Problem("tensor is missing", full, "download the checkpoint again")
            elif tuple(reader.info(full).shape) != tuple(wanted):
                found = list(reader.info(full).shape)
                yield Problem(f"shape {found} where config.json means {list(wanted)}", full)
    for name in reader.names:
        # Old releases stored the rotary buffers; a tied head may be stored beside the embedding.
        if name in known or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.startswith(f"{family.head}.") and config.tie_word_embeddings:
            continue
        yield Problem("unexpected tensor: config.json does not account for it", name)
