"""Orthogonal matrices that spread every coordinate over all others: random Hadamard matrices.

A Hadamard matrix has entries +-1 and orthogonal rows. They are known for 2^k (Sylvester), q + 1 and
2 (q + 1) with primes q of the right remainder (Paley), and Kronecker products of those are some
again. That covers the hidden sizes of nearly all models; for others the odd part is a random
orthogonal matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

_FACTOR = 64  # of a power of two: small enough that products with it cost next to nothing
_ELEMENTS = 1 << 22  # worked on at a time, in float64


@dataclass(frozen=True)
class Rotation:
    """The orthogonal Q = diag(signs) (F1 x F2 x ...), a Kronecker product that is never formed.

    signs: +-1, float64 [n]. factors: orthogonal, float64 [f, f], with n the product of their sizes.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """`values` @ Q of [..., n], as float32, computed in float64 without a copy of the whole."""
        rows = values.reshape(-1, self.size)
        result = torch.empty(rows.shape, dtype=torch.float32)
        step = max(1, _ELEMENTS // self.size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            left, right = len(part), self.size
            part = part.double() * self.signs
            for factor in self.factors:
                right //= len(factor)
                part = factor.T @ part.view(left, len(factor), right)
                left *= len(factor)
            result[start : start + step] = part.reshape(-1, self.size)
        return result.view(values.shape)

    def matrix(self) -> torch.Tensor:
        """Q, float64 [n, n]: for small n."""
        return self.signs.unsqueeze(1) * reduce(torch.kron, self.factors)


def random_hadamard(size: int, generator: torch.Generator) -> Rotation:
    """A Hadamard matrix of that size over its root, its rows multiplied by random signs.

    Where none is constructed here, the odd part of `size` is a random orthogonal matrix.
    """
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    odd = size
    while odd % 2 == 0:
        odd //= 2
    base = odd
    if odd > 1:
        base = next((n for n in _doublings(4 * odd, size) if _paley_prime(n)), odd)
        first = _paley(base) / base**0.5 if base != odd else _random_orthogonal(odd, generator)
    factors = [first] if odd > 1 else []
    rest = size // base
    while rest > 1:
        factor = min(rest, _FACTOR)
        factors.append(_sylvester(factor) / factor**0.5)
        rest //= factor
    return Rotation(signs, tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),))


def _doublings(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... that divide `last`."""
    found = []
    while last % first == 0:
        found.append(first)
        first *= 2
    return found


def _paley_prime(size: int) -> int | None:
    """The prime q that Paley's construction of that size, a multiple of 4, starts from."""
    if _is_prime(size - 1):  # which is 3 modulo 4
        return size - 1
    q = size // 2 - 1
    return q if q % 4 == 1 and _is_prime(q) else None


def _paley(size: int) -> torch.Tensor:
    """Paley's Hadamard matrix, I for size = q + 1 and II for 2 (q + 1)."""
    q = _paley_prime(size)
    assert q is not None
    # Which differences are squares modulo q: +1, others -1, and 0 for none.
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = character[(index.unsqueeze(1) - index) % q]
    core[0, 1:] = 1
    core[1:, 0] = -1 if size == q + 1 else 1
    identity = torch.eye(q + 1, dtype=torch.float64)
    if size == q + 1:
        return core + identity
    kept = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    turned = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(core, kept) + torch.kron(identity, turned)


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], 1)
    return matrix


def _random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).contiguous()


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
