"""The WebGPU device: memory and copies, on whatever Vulkan driver the machine has."""

from __future__ import annotations

import numpy as np
import pytest
from wgpu_for_tests import gpu

import tvm

pytestmark = gpu


@pytest.fixture(scope="module")
def device() -> tvm.runtime.Device:
    from mlcawq.engine import wgpu

    wgpu.load()
    return tvm.device("webgpu", 0)


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 20_000_001])
def test_bytes_come_back_as_they_were_sent(device, nbytes: int) -> None:
    seed = np.random.SeedSequence().entropy
    sent = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    assert np.array_equal(tvm.runtime.tensor(sent, device=device).numpy(), sent), f"seed {seed}"
