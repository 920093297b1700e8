"""8-bit weights: their layout, "n16k4", and numpy's way into it and out of it.

Symmetric: w = q * scale with q in -127..127. A vector of 16 words is 16 outputs with four inputs
each, and what is read next lies behind it, for all of K:

    qweight  int32   [ceil(N/16), K/4, 16]  byte j of word (b, k, n): 128 + q of input 4k + j of
                                            output 16b + n
    scales   float16 [ceil(N/16), K/G, 16]

Bytes are unsigned, as the first operand of VPDPBUSD is. Outputs beyond N are zero: q 0, scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing

BLOCK_N = 16  # outputs side by side
PACK = 4  # inputs in a word
OFFSET = 128  # what is stored is q + OFFSET
LARGEST = 127
GROUP_SIZES = (128, 64, 32)  # the most accurate last; a scale of float16 costs 16/G bits a weight

Parameters = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Int8Shape:
    """K inputs, N outputs, groups of `group_size` inputs share a scale.

    Raises ValueError for what the layout cannot hold.
    """

    K: int
    N: int
    group_size: int

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not one of {GROUP_SIZES}")
        if self.K <= 0 or self.K % self.group_size:
            raise ValueError(f"K={self.K} is not a multiple of the group size {self.group_size}")
        if self.N <= 0:
            raise ValueError(f"N={self.N} is not positive")

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return self.K // self.group_size

    @property
    def blocks(self) -> int:
        """Blocks of 16 outputs, the last one padded."""
        return -(-self.N // BLOCK_N)

    def parameters(self, scale_dtype: str = "float16") -> Parameters:
        """Shape and dtype of qweight and scales, in the kernels' order."""
        return {
            "qweight": ((self.blocks, self.K // PACK, BLOCK_N), "int32"),
            "scales": ((self.blocks, self.groups, BLOCK_N), scale_dtype),
        }


def pack(q: np.ndarray) -> np.ndarray:
    """Values -127..127, int8 [N, K] -> words, int32 [ceil(N/16), K/4, 16]."""
    N, K = q.shape
    stored = np.full((-(-N // BLOCK_N) * BLOCK_N, K), OFFSET, np.uint8)
    np.add(q.view(np.uint8), np.uint8(OFFSET), out=stored[:N])  # modulo 256, as it should be
    words = stored.view("<i4").reshape(-1, BLOCK_N, K // PACK)
    return np.ascontiguousarray(words.transpose(0, 2, 1))


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """scales [N, K/G] -> [ceil(N/16), K/G, 16] of the same type."""
    padded = np.pad(scales, ((0, -len(scales) % BLOCK_N), (0, 0)))
    by_block = padded.reshape(-1, BLOCK_N, scales.shape[1])
    return np.ascontiguousarray(by_block.transpose(0, 2, 1))


def dequantize(
    qweight: np.ndarray,
    scales: np.ndarray,
    N: int,
    dtype: np.typing.DTypeLike = np.float64,
) -> np.ndarray:
    """The weight [N, K] that packed arrays stand for. float32 holds every product exactly."""
    words = np.ascontiguousarray(qweight.transpose(0, 2, 1))
    K = words.shape[2] * PACK
    q = words.view(np.uint8).reshape(-1, K)[:N].astype(dtype)
    q -= OFFSET
    by_output = scales.transpose(0, 2, 1).reshape(-1, scales.shape[1])[:N].astype(dtype)
    q *= by_output.repeat(K // scales.shape[1], axis=1)
    return q
