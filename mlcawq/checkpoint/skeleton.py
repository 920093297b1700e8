"""A decoder of transformers without its weights, and where its parts are.

Parameters are on the meta device and cost nothing. Buffers that are computed (rotary tables,
embedding scales) are real: transformers knows how to make each anew after such a start, because
`from_pretrained` starts in the same way. Where the blocks, the embedding and the head are is read
off the model, so that an architecture need not be known beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlcawq.checkpoint.decoder_config import DecoderConfig, auto_class
from mlcawq.errors import UserError


@dataclass(frozen=True)
class Skeleton:
    """A causal language model of transformers whose parameters are on the meta device.

    decoder: the path of the language model proper beside which a vision tower stands; "" where
        the whole model is text.
    layers, embedding, head: the paths of the list of decoder blocks, of the input embedding and
        of the linear that gives logits, in `model`.
    """

    model: Any
    decoder: str
    layers: str
    embedding: str
    head: str

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return list(self.model.get_submodule(self.layers))

    def is_text(self, tensor: str) -> bool:
        """Whether a tensor of the model belongs to the decoder, not to a tower beside it."""
        prefixes = (f"{self.decoder}." if self.decoder else "", f"{self.embedding}.")
        return tensor.startswith((*prefixes, f"{self.head}."))


def make_skeleton(config: DecoderConfig, attention: str = "sdpa") -> Skeleton:
    """The model that a config describes, without weights, in eval mode.

    attention: transformers' attention implementation; "eager" is taken where the architecture
        does not have it.
    Raises UserError for what is no decoder-only language model of transformers.
    """
    model = _on_meta(config, attention)
    _compute_buffers(model)
    embedding = _path_of(model, model.get_input_embeddings())
    head = _path_of(model, model.get_output_embeddings())
    layers = _layers_of(model, config.num_hidden_layers)
    if embedding is None or head is None or layers is None:
        raise UserError.one(
            f"{type(model).__name__} is not built of an embedding, a list of decoder blocks and "
            "a head, so it cannot be run block by block",
            "config.json",
        )
    decoder = "" if config.hf is config.whole else _path_of(model, model.get_decoder())
    return Skeleton(model, decoder or "", layers, embedding, head)


def _on_meta(config: DecoderConfig, attention: str) -> Any:
    auto = auto_class(type(config.whole))
    # The config becomes the model's own, which writes into it.
    whole = copy.deepcopy(config.whole)
    with torch.device("meta"):
        try:
            model = auto.from_config(whole, attn_implementation=attention, dtype=torch.float32)
        except ValueError:
            if attention == "eager":
                raise
            whole = copy.deepcopy(config.whole)
            model = auto.from_config(whole, attn_implementation="eager", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _compute_buffers(model: Any) -> None:
    """Give content to every buffer that no checkpoint holds."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # what `initialize_weights` is to leave alone
    made = []
    for name, buffer in list(model.named_non_persistent_buffers()):
        module, leaf = _owner(model, name)
        empty = torch.empty(buffer.shape, dtype=buffer.dtype)
        if empty.is_floating_point():
            empty.fill_(torch.nan)  # so that one which is forgotten is seen
        module._buffers[leaf] = empty
        made.append(name)
    model.initialize_weights()
    for name in made:
        module, leaf = _owner(model, name)
        buffer = module._buffers[leaf]
        if buffer.is_floating_point() and buffer.isnan().any():
            raise UserError.one(
                f"transformers does not compute the buffer {name} of {type(model).__name__} "
                "apart from its weights",
                "config.json",
                "this architecture cannot be run block by block with this transformers release",
            )


def _owner(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    path, _, leaf = tensor.rpartition(".")
    return model.get_submodule(path), leaf


def _path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, found in model.named_modules() if found is module), None)


def _layers_of(model: Any, count: int) -> str | None:
    """The path of the list of decoder blocks: the outermost list of so many in the decoder."""
    decoder = _path_of(model, model.get_decoder()) or ""
    found = [path for path in _lists(model, decoder) if len(model.get_submodule(path)) == count]
    return min(found, key=lambda path: path.count("."), default=None)


def _lists(model: nn.Module, within: str) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and (not within or path.startswith(f"{within}.")):
            yield path
