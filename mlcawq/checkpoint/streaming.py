"""A checkpoint run one decoder block at a time.

The blocks are transformers' own, built on the meta device: they cost nothing until a block's
tensors are read, and a block is gone when its caller drops it. Everything around the blocks is
computed by the model's own forward, so that it stays right for every architecture, rope type,
layer type and transformers release.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.skeleton import make_skeleton
from mlcawq.checkpoint.stages import RowEmbedding, SlicedHead, Stages
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.unknown import worked_out
from mlcawq.errors import raise_all
from mlcawq.families import Architecture
from mlcawq.quantize.activations import RoundedInputs

_HEAD_BYTES = 128 * 2**20  # of head weights held in the compute type at a time
_PLANS_KEPT = 8


class StreamedModel:
    """Any Hugging Face folder of a decoder of transformers (fp16, bf16, fp32, or quantized).

    folder: checkpoint folder with config.json and safetensors.
    dtype: type that everything is computed in.
    attention: transformers' attention implementation, "sdpa" or "eager".
    reader: where tensors are read; the folder's own files when None.

    Raises UserError naming every tensor that is missing, unexpected or of the wrong shape, and for
    an architecture that cannot be run block by block.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        reader: TensorReader | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        self.outline = Outline(self.folder, reader, attention)
        raise_all(self.outline.problems())
        self.config = self.outline.config
        self.reader = self.outline.reader
        self.num_blocks = self.outline.num_blocks
        self._names = self.outline.names
        self._stages = self._make_stages()
        self._stages.check()
        self._plans: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def _make_stages(self) -> Stages:
        """Stages on the skeleton's model, with what is outside of the blocks read but two."""
        skeleton, model = self.outline.skeleton, self.outline.skeleton.model
        layers = model.get_submodule(skeleton.layers)
        stages = Stages(model, layers, self.config.hidden_size, self.config.plain_tokens)
        embedding, head = f"{skeleton.embedding}.weight", f"{skeleton.head}."
        for name in list(model.state_dict()):
            if skeleton.is_text(name) and name != embedding and not name.startswith(head):
                self._set(model, name)
        _replace(model, skeleton.embedding, lambda old: RowEmbedding(old, self._embedding_rows))
        _replace(
            model,
            skeleton.head,
            lambda old: SlicedHead(old, self._head_weight, self._head_bias, self._head_rows),
        )
        return stages

    def _set(self, model: nn.Module, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        value = self._names.state(path, _Only(leaf), self.tensor)[leaf]
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _embedding_rows(self, ids: torch.Tensor) -> torch.Tensor:
        name = self._source(f"{self.outline.skeleton.embedding}.weight")
        return self.reader.torch_rows(name, ids).to(self.dtype)

    def _head_weight(self) -> torch.Tensor:
        return self.outline.stored.as_stored(self._source(f"{self.outline.skeleton.head}.weight"))

    def _head_bias(self) -> torch.Tensor | None:
        name = self._names.source_of(f"{self.outline.skeleton.head}.bias")
        return None if name is None else self.tensor(name)

    def _head_rows(self, width: int) -> int:
        return max(1, _HEAD_BYTES // (width * self.dtype.itemsize))

    def _source(self, name: str) -> str:
        found = self._names.source_of(name)
        assert found is not None  # `_tensor_problems` has looked for it
        return found

    @property
    def architecture(self) -> Architecture:
        """The scaling groups of this kind of model. Where there is no table, blocks are traced."""
        if self.outline.table is None:
            self.outline.table = worked_out(self)
        return self.outline.table

    # Tensors

    def block_name(self, i: int) -> str:
        """See `Outline.block_name`."""
        return self.outline.block_name(i)

    def checkpoint_name(self, i: int, name: str) -> str:
        """See `Outline.checkpoint_name`."""
        return self.outline.checkpoint_name(i, name)

    def block_tensors(self, i: int) -> list[str]:
        """See `Outline.block_tensors`."""
        return self.outline.block_tensors(i)

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of that full name is stored in integers."""
        return self.outline.stored.is_quantized(linear)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its unquantized name in the checkpoint, in the compute type if it is of
        floating point; quantized weights dequantized."""
        tensor = self.outline.stored.as_stored(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def stored_name(self, path: str) -> str:
        """The checkpoint's name of a tensor or module of transformers' model, by its path there."""
        return self._names.stored_name(path)

    def module(self, path: str) -> nn.Module:
        """A module outside of the blocks, by its path in transformers' model ("model.norm")."""
        return self.outline.skeleton.model.get_submodule(path)

    def bare_block(self, i: int) -> nn.Module:
        """Decoder block i as `block` gives it, its parameters on the meta device."""
        return self.outline.bare_block(i)

    def block(self, i: int) -> nn.Module:
        """Decoder block i with its weights, in eval mode. The caller owns it.

        Experts are modules of their own, with linears named as in the checkpoint. Linears that are
        stored for quantized activations round what they are given.
        """
        block = self.bare_block(i)
        state = self._names.state(self.outline.path(i), block, self.tensor)
        block.load_state_dict(state, assign=True)
        for name, module in block.named_modules():
            bits = self._activation_bits(self.checkpoint_name(i, name))
            if bits is not None and isinstance(module, nn.Linear):
                RoundedInputs([module], bits)
        return block.eval().requires_grad_(False)

    def _activation_bits(self, linear: str) -> int | None:
        spec = self.outline.stored.linears.get(linear)
        return None if spec is None else spec.activation_bits

    def whole(self) -> Any:
        """transformers' causal LM, weights in the compute type."""
        skeleton = make_skeleton(self.config)
        model = skeleton.model
        layers = model.get_submodule(skeleton.layers)
        for i in range(self.num_blocks):
            layers[i] = self.block(i)
        for name, tensor in list(model.state_dict().items()):
            if tensor.is_meta and skeleton.is_text(name):
                self._set(model, name)
        return model

    # Running

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> what enters block 0, [B, T, hidden_size]."""
        return self._stages.embed(ids)

    def layer_arguments(self, i: int, batch: int, tokens: int) -> dict[str, Any]:
        """What the model calls layer i with, beside the hidden states, for [batch, tokens]."""
        key = (batch, tokens)
        if key not in self._plans:
            self._plans[key] = self._stages.calls(batch, tokens)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key][i]

    @torch.no_grad()
    def run_block(self, block: nn.Module, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, hidden_size] through `block`, called as layer i is."""
        output = block(hidden, **self.layer_arguments(i, *hidden.shape[:2]))
        return output if isinstance(output, torch.Tensor) else output[0]

    def hidden_states(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids [B, T] each -> last hidden states before the final norm, [B, T, hidden]."""
        states = [self.embed(ids) for ids in batches]
        for i in range(self.num_blocks):
            block = self.block(i)
            for j, hidden in enumerate(states):
                states[j] = self.run_block(block, i, hidden)
        return states

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden_size] -> float32 logits [..., vocab_size].

        Final norm, head, scale and softcap are applied. The head is read in slices of the
        vocabulary, so that a large one is never copied whole into the compute type.
        """
        return self._stages.head(hidden)

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


class _Only(nn.Module):
    """A module of one tensor of that name, for asking a TensorMap for it."""

    def __init__(self, leaf: str) -> None:
        super().__init__()
        self.register_buffer(leaf, torch.empty(0))


def _replace(model: nn.Module, path: str, make: Any) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, make(getattr(owner, leaf)))
