"""Rows of a table that no binding holds whole, as embeddings of large vocabularies are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.backends import WEBGPU, Random, VulkanKernel, backend_named
from tests.tir_kernels.kernels import poisoned
from tir_kernels import vulkan
from tir_kernels._tvm import Target
from tir_kernels.vulkan import limits


@pytest.mark.parametrize("n", [1, 96, 97, 300])
def test_rows_of_every_part(n: int, rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    backend_named("vulkan")
    width = 104
    monkeypatch.setattr(limits, "BINDING_BYTES", 100 * width * 2)  # parts of 96 rows
    kernel = VulkanKernel(vulkan.take_rows.__wrapped__(WEBGPU, width, "float16"), WEBGPU)
    table = rng.floats(n, width)
    rows = np.concatenate([np.arange(-2, n + 2), rng.integers(0, n, 20)]).astype(np.int32)
    rng.shuffle(rows)
    out = poisoned((len(rows), width), "float16")
    kernel(table, rows, out)
    np.testing.assert_array_equal(out, table[rows.clip(0, n - 1)], f"seed {rng.seed}")


def test_whole_buffers_for_tvms_own_vulkan() -> None:
    target = Target({"kind": "vulkan"}, host={"kind": "llvm"})
    assert "handle_add_byte_offset" in vulkan.take_rows(WEBGPU, 64, "float16").script()
    assert "handle_add_byte_offset" not in vulkan.take_rows(target, 64, "float16").script()
