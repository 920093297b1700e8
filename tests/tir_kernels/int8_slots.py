"""The slots of `tir_kernels.cpu.slots` in numpy: a byte an element, and a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import runtime

from tests.tir_kernels.kernels import in_eight_bits, poisoned


@dataclass(frozen=True)
class Stored:
    """What kernels and TVM's cache see of heads of d elements. stored: "int8" or None."""

    d: int
    dtype: str
    stored: str | None = None

    @property
    def options(self) -> dict[str, str]:
        return {} if self.stored is None else {"stored": self.stored}

    @property
    def lse_error(self) -> float:
        """That attention may have. Two bfloat16 hold a float16, but not all of a byte's product
        with its scale.
        """
        return 1e-4 if self.stored is None else 3e-4

    @property
    def size(self) -> int:
        if self.stored is None:
            return self.d
        return (self.d + 4) // np.dtype(self.dtype).itemsize

    def heads(self, count: int) -> int:
        return -(-count * self.d // self.size)

    def packed(self, x: np.ndarray) -> np.ndarray:
        """[..., d] -> slots [..., size]: bytes, then the scale."""
        if self.stored is None:
            return x
        integers, scales = in_eight_bits(x, self.d)
        bytes_ = [integers.reshape(x.shape).view(np.uint8), scales.view(np.uint8)]
        return np.concatenate(bytes_, -1).view(self.dtype)

    def unpacked(self, slots: np.ndarray) -> np.ndarray:
        """[..., size] -> what attention reads, [..., d]."""
        if self.stored is None:
            return slots
        bytes_ = np.ascontiguousarray(slots).view(np.uint8)
        integers = bytes_[..., : self.d].view(np.int8).astype(np.float64)
        scales = np.ascontiguousarray(bytes_[..., self.d :]).view(np.float32)
        with np.errstate(invalid="ignore"):  # a scale that is infinite
            return integers * scales.astype(np.float64)

    def pages(self, slots: np.ndarray) -> np.ndarray:
        """Pages [..., PAGE, size] of slots, as the cache keeps them: the bytes, then the scales."""
        if self.stored is None:
            return slots
        bytes_ = np.ascontiguousarray(slots).view(np.uint8)
        parts = [bytes_[..., : self.d], bytes_[..., self.d :]]
        flat = [part.reshape(*slots.shape[:-2], -1) for part in parts]
        return np.concatenate(flat, -1).view(self.dtype).reshape(slots.shape)

    def queries(self, q: np.ndarray) -> np.ndarray:
        """[n, heads, d] in the memory of the heads that the cache counts."""
        n, heads, _ = q.shape
        found = np.full((n, self.heads(heads), self.size), np.nan, q.dtype)
        self.real(found, heads, self.d)[:] = q
        return found

    def fused(self, qkv: np.ndarray, kv_heads: int) -> Any:
        """[n, q + 2 kv heads, d] as the cache is handed it, which is less than there is."""
        n, heads, _ = qkv.shape
        shape = n, self.heads(heads - 2 * kv_heads) + 2 * kv_heads, self.size
        return runtime.tensor(qkv)._create_view(shape)

    def outputs(self, n: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Poisoned memory for what attention gives, and for its lse."""
        heads = self.heads(heads)
        return poisoned((n, heads, self.size), self.dtype), poisoned((n, heads), "float32")

    def real(self, seen: np.ndarray, heads: int, *width: int) -> np.ndarray:
        """What a kernel has written for its own heads, [n, heads, *width]."""
        shape = (len(seen), heads, *width)
        return seen.reshape(-1)[: math.prod(shape)].reshape(shape)
