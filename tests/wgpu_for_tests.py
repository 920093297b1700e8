"""What tests of the WebGPU device need to know before they run."""

from __future__ import annotations

import functools

import pytest

from mlcawq.errors import UserError


@functools.cache
def missing() -> str:
    """Why this machine cannot run kernels through Vulkan; empty when it can."""
    from mlcawq.engine import wgpu

    try:
        wgpu.load()
    except UserError as error:
        return str(error)
    return ""


gpu = pytest.mark.skipif(bool(missing()), reason=f"no Vulkan device: {missing()}")
