"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest

from tests.tir_kernels.backends import Backend, Random, backend_named


@pytest.fixture(params=["cpu", "cuda", "vulkan"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


@pytest.fixture(params=["cuda", "vulkan"])
def gpu(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


@pytest.fixture
def rng() -> Random:
    return Random()
