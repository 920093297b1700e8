"""Running parts of a model by the model's own forward.

What happens before the first decoder block (scaled embeddings, positions, norms), what each block
is called with (masks, rotary embedding, windows) and what follows the last one (norm, head, scale,
softcap) is written in every architecture's forward and nowhere else. So that forward is run, with
the blocks replaced by recorders that compute nothing, the embedding by one that reads the rows it
needs, and the head by one that reads its weight in slices.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mlcawq.errors import UserError


class _StoppedError(Exception):
    """Nothing that the model would still compute is wanted."""


class _Standing(nn.Module):
    """A module in the place of another, whose settings it still shows."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # In a tuple, it is no submodule: its weights are not this one's.
        self._original = (original,)
        if isinstance(getattr(original, "weight", None), torch.Tensor):
            # Models ask for the place and type of the embedding's weight.
            self.weight = torch.empty(0, *original.weight.shape[1:])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


class RowEmbedding(_Standing):
    """An embedding that reads the rows of the ids it is given.

    read: distinct int64 ids [n] -> their rows [n, width] in the type of the computation.
    """

    def __init__(self, original: nn.Module, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(original)
        self._read = read

    def forward(self, ids: torch.Tensor, *rest: Any, **others: Any) -> Any:
        # The class's own forward may scale: it runs on a table of these rows alone.
        (original,) = self._original
        module = copy.copy(original)
        module.padding_idx = None  # would have to be an index into the table
        distinct, places = ids.unique(return_inverse=True)
        table = {"weight": self._read(distinct)}
        return functional_call(module, table, (places, *rest), others)


class SlicedHead(_Standing):
    """A head whose weight is converted to the type of the computation a slice at a time.

    weight: () -> the weight [vocabulary, width] in its stored type.
    bias: () -> the bias [vocabulary], or None.
    rows: vocabulary entries in a slice.
    """

    def __init__(
        self,
        original: nn.Module,
        weight: Callable[[], torch.Tensor],
        bias: Callable[[], torch.Tensor | None],
        rows: Callable[[int], int],
    ) -> None:
        super().__init__(original)
        self._weight_of, self._bias_of, self._rows_of = weight, bias, rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weight_of(), self._bias_of()
        logits = torch.empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)
        rows = self._rows_of(weight.shape[1])
        for start in range(0, len(weight), rows):
            logits[..., start : start + rows] = hidden @ weight[start : start + rows].to(hidden).T
        return logits if bias is None else logits.add_(bias)


class _Recorder(_Standing):
    """A block that notes what it is called with, and hands its input on."""

    def __init__(self, original: nn.Module, number: int, run: _Run) -> None:
        super().__init__(original)
        self._number = number
        self._run = run
        self._signature = inspect.signature(original.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        hidden = arguments.pop(next(iter(self._signature.parameters)))
        return self._run.called(self._number, hidden, arguments)


class _Run:
    """What the recorders share: where they are in a forward, and what it is for."""

    def __init__(self, blocks: Sequence[nn.Module], width: int, name: str) -> None:
        self._blocks, self._width, self._name = blocks, width, name
        self._form: Callable[[torch.Tensor], Any] | None = None
        self.start()

    def start(self, *, until: int | None = None, injected: torch.Tensor | None = None) -> None:
        """Before a forward. until: the block at which it stops. injected: what the last gives."""
        self.calls: list[dict[str, Any]] = []
        self.first: torch.Tensor | None = None
        self._passed: torch.Tensor | None = None
        self._until, self._injected = until, injected

    def called(self, number: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> Any:
        if number != len(self.calls) or (number and hidden is not self._passed):
            raise self._unsupported("does more between its blocks than hand a tensor on")
        if hidden.ndim != 3 or hidden.shape[-1] != self._width:
            raise self._unsupported(f"hands {list(hidden.shape)} from block to block")
        if number == 0:
            self.first = hidden
        self.calls.append(arguments)
        self._passed = hidden
        if number == self._until:
            raise _StoppedError
        if number == len(self._blocks) - 1 and self._injected is not None:
            hidden = self._injected
        if self._form is None:
            self._form = _form_of(self._blocks[number], hidden, arguments)
        return self._form(hidden)

    def _unsupported(self, what: str) -> UserError:
        return UserError.one(
            f"{self._name} {what}, so it cannot be run block by block", "config.json"
        )


def _form_of(
    block: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]
) -> Callable[[torch.Tensor], Any]:
    """How a block returns hidden states: as they are, or first in a tuple.

    Found by running the block with weights of zero, whose pages are never written.
    """
    zeros = copy.deepcopy(block)
    state = {
        name: torch.zeros(tensor.shape, dtype=hidden.dtype if tensor.is_floating_point() else None)
        for name, tensor in zeros.state_dict().items()
    }
    zeros.load_state_dict(state, assign=True)
    output = zeros(hidden, **arguments)
    if isinstance(output, torch.Tensor):
        return lambda states: states
    rest = tuple(output[1:])
    return lambda states: (states, *rest)


class Stages:
    """The embedding stage, the calls of the blocks and the head stage of a model.

    model: the causal language model; its blocks, embedding and head are replaced in it.
    layers: its list of blocks. width: of the hidden states.
    tokens: two ids of ordinary tokens, for what does not depend on the text.
    """

    def __init__(
        self, model: Any, layers: nn.ModuleList, width: int, tokens: tuple[int, int]
    ) -> None:
        self._model = model
        self._tokens = tokens
        blocks = list(layers)
        self._last = len(blocks) - 1
        self._run = _Run(blocks, width, type(model).__name__)
        self._name = type(model).__name__
        for i, block in enumerate(blocks):
            layers[i] = _Recorder(block, i, self._run)

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> what enters block 0, [B, T, width]."""
        self._forward(ids, until=0)
        assert self._run.first is not None
        return self._run.first

    @torch.no_grad()
    def calls(self, batch: int, tokens: int) -> list[dict[str, Any]]:
        """What each block is called with for [batch, tokens], beside the hidden states."""
        self._forward(torch.full((batch, tokens), self._tokens[0]), until=self._last)
        return self._run.calls

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What leaves the last block, [..., width] -> float32 logits [..., vocabulary]."""
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.full(rows.shape[:2], self._tokens[0])
        logits = self._forward(ids, injected=rows).logits
        return logits.float().reshape(*hidden.shape[:-1], -1)

    def _forward(self, ids: torch.Tensor, **how: Any) -> Any:
        self._run.start(**how)
        try:
            return self._model(input_ids=ids, use_cache=False)
        except _StoppedError:
            return None

    @torch.no_grad()
    def check(self) -> None:
        """Raise UserError for an architecture whose blocks cannot be run one by one."""
        found = []
        for token in self._tokens:
            self._forward(torch.full((1, 2), token), until=self._last)
            found.append(self._run.calls)
            if self._run.first is None or self._run.first.shape[:2] != (1, 2):
                raise UserError.one(
                    f"{self._name} adds to the text, so it cannot be run block by block",
                    "config.json",
                )
        for first, second in zip(*found, strict=True):
            for name, value in first.items():
                if not _same(value, second.get(name)):
                    raise UserError.one(
                        f"the blocks of {self._name} read the text again ({name}), so it cannot "
                        "be run block by block",
                        "config.json",
                    )


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, as far as tensors in them can tell."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
