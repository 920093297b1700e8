"""Whether this machine can run kernels through Vulkan, be it in software."""

from __future__ import annotations

import functools

import pytest

from mlcawq.errors import UserError


@functools.cache
def missing() -> str:
    """Why this machine cannot run kernels through Vulkan; empty when it can."""
    import tvm  # noqa: F401  with its compiler, which tests need and the engine would leave out

    from mlcawq.engine import wgpu

    try:
        wgpu.load()
    except UserError as error:
        return " ".join(str(error).split())
    return ""


needs_vulkan = pytest.mark.skipif(bool(missing()), reason=f"no Vulkan device: {missing()}")
