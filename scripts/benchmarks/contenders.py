"""What is compared: our kernels, torch's, and mlc_llm's generic schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.cases import GROUP_SIZE, Case
from benchmarks.prebuilt import Prebuilt, row_class

Apply = Callable[[torch.Tensor], torch.Tensor]


class UnavailableError(Exception):
    """str(): why a contender does not take part."""


class Contender(Protocol):
    """tolerance: relative error that its arithmetic may have. dtype: of the activations that it
    takes. peer: whether ours is to beat it.
    """

    name: str
    tolerance: float
    dtype: torch.dtype
    peer: bool

    def load(self, case: Case) -> Callable[[], Apply]:
        """A function that makes one more copy of the weights, and returns what multiplies by it.

        Raises UnavailableError.
        """


@dataclass(frozen=True)
class Ours:
    """Kernels of a prepared folder. library: which of its libraries."""

    prebuilt: Prebuilt
    library: str
    name: str
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = False

    def load(self, case: Case) -> Callable[[], Apply]:
        function = self.prebuilt.function(self.library, case.linear.key)
        weights = case.tiled if self.library == "tiled" else case.stock
        return lambda: calling(lambda m: function, cloned(weights), case.linear.N)


@dataclass(frozen=True)
class Generic:
    """mlc_llm's linear under TVM's generic schedules; sums in float16."""

    prebuilt: Prebuilt
    name: str = "mlc_llm"
    tolerance: float = 5e-2
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        def function(m: int) -> Any:
            return self.prebuilt.function("generic", f"{case.linear.key}_{row_class(m)}")

        return lambda: calling(function, cloned(case.stock), case.linear.N)


def calling(function: Callable[[int], Any], weights: Any, N: int) -> Apply:
    """A call of TVM's function for m rows, which writes into a tensor that it is given."""
    outputs: dict[int, torch.Tensor] = {}

    def apply(x: torch.Tensor) -> torch.Tensor:
        m = x.shape[0]
        if m not in outputs:
            outputs[m] = torch.full((m, N), float("nan"), dtype=x.dtype, device=x.device)
        function(m)(x, *weights, outputs[m])
        return outputs[m]

    return apply


@dataclass(frozen=True)
class TorchHalf:
    """torch's float16 product with the dequantized weight: cuBLAS."""

    name: str = "cuBLAS fp16"
    tolerance: float = 2e-3
    dtype: torch.dtype = torch.float16
    peer: bool = True

    def load(self, case: Case) -> Callable[[], Apply]:
        weight = case.dense(torch.float32).half().t().contiguous()

        def copy() -> Apply:
            own = weight.clone()
            return lambda x: torch.nn.functional.linear(x, own)

        return copy


@dataclass(frozen=True)
class TorchInt4:
    """torch.ops.aten._weight_int4pack_mm (tinygemm): bfloat16, w = (q - 8) * s + b."""

    name: str = "int4pack_mm"
    tolerance: float = 2e-2
    dtype: torch.dtype = torch.bfloat16
    peer: bool = True
    inner_tiles: int = field(default=8, repr=False)

    def load(self, case: Case) -> Callable[[], Apply]:
        q, z = case.values
        by_output = q.t().contiguous().int()
        packed = (by_output[:, ::2] << 4 | by_output[:, 1::2]).to(torch.uint8)
        try:
            weight = torch.ops.aten._convert_weight_to_int4pack(packed, self.inner_tiles)
        except RuntimeError as error:
            raise UnavailableError(str(error).splitlines()[0]) from None
        scales = case.scales.float()
        offsets = (8 - z.float()) * scales
        pairs = torch.stack((scales, offsets), -1).bfloat16().contiguous()

        def copy() -> Apply:
            own, own_pairs = weight.clone(), pairs.clone()
            return lambda x: torch.ops.aten._weight_int4pack_mm(x, own, GROUP_SIZE, own_pairs)

        return copy


def cloned(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)
