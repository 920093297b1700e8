"""Quantized linears read as the weights that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlcawq.build.mlc_plugin.dequantized import DequantizingReader
from tir_kernels.reference import dequantize

GATE, UP = "mlp.gate.weight", "mlp.up.weight"


def checkpoint(folder: Path, groups: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    content: dict[str, np.ndarray] = {"mlp.norm.weight": np.ones(64, np.float16)}
    for linear in ("gate", "up"):
        words = random.integers(-(2**31), 2**31, (64 + groups, 1)).astype(np.int32)
        content[f"mlp.{linear}.qweight"] = words[:64]
        content[f"mlp.{linear}.qzeros"] = words[64:]
        content[f"mlp.{linear}.scales"] = random.random((2, 8)).astype(np.float16)
    save_file(content, folder / "model.safetensors")
    return content


def test_wanted_weights_are_dequantized(tmp_path: Path) -> None:
    content = checkpoint(tmp_path)
    reader = DequantizingReader(tmp_path, [GATE, "mlp.norm.weight", "mlp.absent.weight"])
    parts = [content[f"mlp.gate.{part}"] for part in ("qweight", "qzeros", "scales")]
    expected = dequantize(*parts, np.float32).T
    assert reader.info(GATE).shape == expected.shape
    assert reader.info(GATE).dtype == "F32"
    np.testing.assert_array_equal(reader.numpy(GATE), expected)
    kept = {"mlp.norm.weight", "mlp.up.qweight", "mlp.up.qzeros", "mlp.up.scales"}
    assert set(reader.names) == set(reader.listed) == {GATE, *kept}
    assert len(reader.listed) == len(set(reader.listed))
    for name in kept:
        np.testing.assert_array_equal(reader.numpy(name), content[name])


def test_arrays_that_do_not_fit_each_other_stay(tmp_path: Path) -> None:
    content = checkpoint(tmp_path, groups=4)
    reader = DequantizingReader(tmp_path, [GATE, UP])
    assert set(reader.names) == set(content)
