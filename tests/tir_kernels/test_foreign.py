"""Kernels as other compilers take them compute what they compute for ours."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import tirx

from tests.tir_kernels.backends import Random, backend_named
from tir_kernels import dispatch
from tir_kernels.foreign import with_root_block, with_unsigned_words
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

K, N, GROUP = 128, 64, 32


@pytest.mark.parametrize(
    ("backend_name", "layout"),
    [("cpu", AUTOAWQ), ("cuda", AUTOAWQ), ("cuda", TILED), ("vulkan", AUTOAWQ), ("vulkan", TILED)],
)
def test_unsigned_words_are_the_same_words(backend_name: str, layout: str) -> None:
    backend, rng = backend_named(backend_name), Random()
    kernel = dispatch.w4a16_linear(backend.target, K, N, GROUP, bias=True, layout=layout)
    shapes = [shape for shape, _ in LinearShape(K, N, GROUP).parameters(layout).values()]
    words = [rng.integers(0, 2**32, shape, dtype=np.uint32) for shape in shapes[:2]]
    x, scales, bias = rng.floats(3, K), rng.floats(*shapes[2]), rng.floats(N)
    expected, actual = (np.full((3, N), np.nan, np.float16) for _ in range(2))
    backend.compile(kernel)(x, *(w.view(np.int32) for w in words), scales, bias, expected)
    backend.compile(with_unsigned_words(kernel))(x, *words, scales, bias, actual)
    assert np.isfinite(expected).all(), f"seed {rng.seed}"
    np.testing.assert_array_equal(actual, expected, f"seed {rng.seed}")


def test_a_root_block_is_given_once() -> None:
    kernel = dispatch.w4a16_linear(backend_named("vulkan").target, K, N, GROUP)
    assert not isinstance(kernel.body, tirx.SBlockRealize)
    rooted = with_root_block(kernel)
    assert rooted.body.block.name_hint == "root"
    assert with_root_block(rooted) is rooted
