"""All between two attentions in one launch: the bits of separate kernels, and numpy's result."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.tir_kernels.backends import Random
from tests.tir_kernels.kernels import (
    Kernel,
    on_threads,
    poisoned,
    relative_error,
    targets_that_run_here,
)
from tests.tir_kernels.test_elementwise import EPS, normalized
from tests.tir_kernels.test_linears import quantized
from tir_kernels import dispatch, reference
from tir_kernels._tvm import PrimFunc, Target
from tir_kernels.cpu.blocked import blocked_linear
from tir_kernels.cpu.decode_block import DecodeBlock
from tir_kernels.cpu.elementwise import add_rms_norm, silu_multiply
from tir_kernels.layouts import AUTOAWQ, BLOCKED, LinearShape

LEVELS = targets_that_run_here()
BEST = list(LEVELS)[-1]
TOLERANCE = {("float16", 16): 3e-3, ("float32", 16): 3e-4, ("float16", 8): 4e-2}
USUAL = ((256, 128, 384, 200), 128, "float16", 16, True)


@functools.cache
def compiled(function: PrimFunc, level: str) -> Kernel:
    return Kernel(function, LEVELS[level])


class Case:
    """Random weights of a block, and what goes in."""

    def __init__(self, rng: Random, sizes: tuple[int, int, int, int], group: int, dtype: str):
        hidden, heads, inner, outputs = sizes
        self.dtype = dtype
        self.shapes = [
            LinearShape(heads, hidden, group),
            LinearShape(hidden, 2 * inner, group),
            LinearShape(inner, hidden, group),
            LinearShape(hidden, outputs, group),
        ]
        generator = np.random.default_rng(rng.seed)
        self.stock = [quantized(generator, s.K, s.N, s.group_size) for s in self.shapes]
        self.attended, self.residual = (
            generator.standard_normal((1, n)).astype(dtype) for n in (heads, hidden)
        )
        self.norms = [generator.standard_normal(hidden).astype(dtype) for _ in range(2)]
        self.bias = generator.standard_normal(outputs).astype(dtype)

    def fused(self, level: str, bits: int, bias: bool, last: bool) -> list[np.ndarray]:
        """The new residual and qkv's outputs; or the normed state."""
        o, gate_up, down, qkv = self.shapes
        block = DecodeBlock(o, gate_up, down, None if last else qkv, bias and not last)
        function = dispatch.decode_block(LEVELS[level], block, EPS, self.dtype, act_bits=bits)
        assert function is not None
        weights = [reference.block(*stock) for stock in self.stock]
        arguments = [*weights[0], self.norms[0], *weights[1], *weights[2], self.norms[1]]
        widths = [o.N] if last else [o.N, qkv.N]
        if not last:
            arguments += [*weights[3], *([self.bias] if bias else [])]
        outs = [poisoned((1, width), self.dtype) for width in widths]
        compiled(function, level)(self.attended, self.residual, *arguments, *outs)
        return outs

    def separate(self, level: str, bits: int, bias: bool) -> list[np.ndarray]:
        """The new residual, qkv's outputs, the normed state."""
        target, hidden, inner = LEVELS[level], self.shapes[0].N, self.shapes[2].K

        def linear(i: int, x: np.ndarray, offset: bool = False) -> np.ndarray:
            shape, out = self.shapes[i], poisoned((1, self.shapes[i].N), self.dtype)
            kernel = blocked_linear(target, shape, self.dtype, self.dtype, offset, act_bits=bits)
            weights = reference.block(*self.stock[i])
            compiled(kernel, level)(x, *weights, *([self.bias] if offset else []), out)
            return out

        def norm(i: int, x: np.ndarray, residual: np.ndarray) -> list[np.ndarray]:
            outs = [poisoned((1, hidden), self.dtype) for _ in range(2)]
            kernel = add_rms_norm(target, hidden, EPS, self.dtype)
            compiled(kernel, level)(x, residual, self.norms[i], *outs)
            return outs

        residual, normed = norm(0, linear(0, self.attended), self.residual)
        activated = poisoned((1, inner), self.dtype)
        kernel = silu_multiply(target, inner, self.dtype)
        compiled(kernel, level)(linear(1, normed), activated)
        residual, normed = norm(1, linear(2, activated), residual)
        return [residual, linear(3, normed, bias), normed]

    def expected(self, bias: bool) -> list[np.ndarray]:
        """As `separate`, in float64."""

        def linear(i: int, x: np.ndarray) -> np.ndarray:
            return reference.w4a16_linear(x, *self.stock[i])

        residual = linear(0, self.attended) + self.residual
        activated = reference.silu_multiply(linear(1, normalized(residual, self.norms[0])))
        residual = linear(2, activated) + residual
        normed = normalized(residual, self.norms[1])
        return [residual, linear(3, normed) + (self.bias if bias else 0), normed]


@pytest.mark.parametrize(
    ("level", "sizes", "group", "dtype", "bits", "bias"),
    [
        *((level, *USUAL) for level in LEVELS),
        (BEST, (96, 160, 32, 40), 32, "float16", 8, False),
        (BEST, (64, 64, 192, 16), 64, "float32", 16, True),
    ],
)
def test_the_bits_of_separate_kernels(
    level: str,
    sizes: tuple[int, int, int, int],
    group: int,
    dtype: str,
    bits: int,
    bias: bool,
    rng: Random,
) -> None:
    case = Case(rng, sizes, group, dtype)
    residual, qkv, normed = case.separate(level, bits, bias)
    found = [*case.fused(level, bits, bias, False), *case.fused(level, bits, bias, True)]
    for got, want, exact in zip(found, (residual, qkv, normed), case.expected(bias), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=str(rng.seed))
        assert relative_error(got, exact) < TOLERANCE[dtype, bits], rng.seed


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads(count: int, rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than steps, too: some have nothing to do then."""
    case = Case(rng, (96, 160, 32, 40), 32, "float16")
    residual, qkv, _ = case.separate(BEST, 16, True)
    for _ in range(3):
        found = on_threads(count, lambda: case.fused(BEST, 16, True, False), monkeypatch)
        for got, want in zip(found, (residual, qkv), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=str(rng.seed))


def test_what_is_not_a_number_is_not_hidden(rng: Random) -> None:
    case = Case(rng, (96, 160, 32, 40), 32, "float16")
    case.attended[0, 77] = np.nan
    for out in case.fused(BEST, 16, True, False):
        assert not np.isfinite(out).any()


def test_other_targets_and_layouts_have_none() -> None:
    shape = LinearShape(64, 64, 64)
    block = DecodeBlock(shape, LinearShape(64, 128, 64), shape, None)
    cuda = Target({"kind": "cuda", "arch": "sm_90"})
    assert dispatch.decode_block(LEVELS[BEST], block, EPS, layout=AUTOAWQ) is None
    assert dispatch.decode_block(cuda, block, EPS, layout=BLOCKED) is None
