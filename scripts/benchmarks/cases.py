"""What is measured: the linears of three models, on random weights and activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tir_kernels.layouts import PACK, column_shift
from tir_kernels.pack_tiles import tile_qweight, tile_qzeros, tile_scales

GROUP_SIZE = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


@dataclass(frozen=True)
class Linear:
    """One fused linear of a model: K inputs, N outputs."""

    model: str
    name: str
    K: int
    N: int

    @property
    def key(self) -> str:
        """What its kernels are called; models may share them."""
        return f"k{self.K}_n{self.N}"

    @property
    def is_large(self) -> bool:
        """Whether reading it takes so long that launching a kernel does not matter."""
        return self.K * self.N >= 2**24

    def bytes_read(self, m: int) -> int:
        """Bytes that must move at least: weights, activations, results."""
        words = self.K * self.N // 2
        groups = self.K // GROUP_SIZE * self.N
        return words + groups // 2 + 2 * groups + 2 * m * (self.K + self.N)

    def operations(self, m: int) -> int:
        """Floating-point operations of the matrix product."""
        return 2 * m * self.K * self.N


def _model(name: str, hidden: int, inner: int, q_size: int, kv_size: int) -> tuple[Linear, ...]:
    return (
        Linear(name, "qkv_proj", hidden, q_size + 2 * kv_size),
        Linear(name, "o_proj", q_size, hidden),
        Linear(name, "gate_up_proj", hidden, 2 * inner),
        Linear(name, "down_proj", inner, hidden),
    )


MODELS = {
    "llama-3-8b": _model("llama-3-8b", 4096, 14336, 4096, 1024),
    "qwen2.5-7b": _model("qwen2.5-7b", 3584, 18944, 3584, 512),
    "qwen2.5-0.5b": _model("qwen2.5-0.5b", 896, 4864, 896, 128),
}


class Case:
    """A linear with random 4-bit weights on a device; seed: of all that is random."""

    def __init__(self, linear: Linear, device: str, seed: int) -> None:
        self.linear = linear
        self.device = torch.device(device)
        self._random = torch.Generator(self.device).manual_seed(seed)
        K, N, groups = linear.K, linear.N, linear.K // GROUP_SIZE
        # Any word is eight 4-bit values. Scales are such that sums stay far from float16's limits.
        self.qweight = self._words(K, N // PACK)
        self.qzeros = self._words(groups, N // PACK)
        spread = torch.rand(groups, N, generator=self._random, device=self.device)
        self.scales = ((0.5 + spread) * 0.01).half()

    @property
    def stock(self) -> tuple[torch.Tensor, ...]:
        """qweight, qzeros, scales in AutoAWQ's layout."""
        return self.qweight, self.qzeros, self.scales

    @cached_property
    def tiled(self) -> tuple[torch.Tensor, ...]:
        """The same in the layout n16k64."""
        pack = (tile_qweight, tile_qzeros, tile_scales)
        return tuple(
            torch.from_numpy(np.ascontiguousarray(function(array.cpu().numpy()))).to(self.device)
            for function, array in zip(pack, self.stock, strict=True)
        )

    @cached_property
    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The 4-bit weights, uint8 [K, N], and zero points, uint8 [K/G, N]."""
        return _unpack(self.qweight), _unpack(self.qzeros)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """(q - z) * s as [K, N]."""
        q, z = self.values
        weight = q.to(dtype).view(-1, GROUP_SIZE, self.linear.N)
        weight = (weight - z.to(dtype)[:, None]) * self.scales.to(dtype)[:, None]
        return weight.view(self.linear.K, self.linear.N)

    def activations(self, m: int) -> torch.Tensor:
        """Normal random float16 [m, K], new ones every time."""
        shape = (m, self.linear.K)
        return torch.randn(shape, generator=self._random, device=self.device).half()

    def _words(self, *shape: int) -> torch.Tensor:
        bits = torch.iinfo(torch.int32)
        return torch.randint(
            bits.min, bits.max, shape, generator=self._random, device=self.device, dtype=torch.int32
        )


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """‖out - expected‖ / ‖expected‖; NaN where out has one."""
    return float((out.double() - expected).norm() / expected.norm())


def _unpack(words: torch.Tensor) -> torch.Tensor:
    columns = [(words >> column_shift(c)) & 15 for c in range(PACK)]
    return torch.stack(columns, -1).to(torch.uint8).view(words.shape[0], -1)
