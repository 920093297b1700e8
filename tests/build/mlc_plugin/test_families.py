"""AWQ of families that mlc_llm cannot load it for, against mlc_llm's own float conversion.

The reference needs no mapping of ours: the weights that an AWQ checkpoint stands for are written as
an ordinary checkpoint, and mlc_llm converts that with the loader it has for the family.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mlc_families import FAMILIES, make_awq_pair, make_family
from mlc_steps import Stored, read_parameters, run_step

from mlcawq.checkpoint.config import load_json
from tir_kernels.reference import dequantize, untile

pytestmark = pytest.mark.mlc_llm
GROUP_SIZE = 32
# Quantized linears of two blocks, as mlc_llm fuses them.
PARTS = ("qweight", "qzeros", "scales")
LINEARS = dict.fromkeys(FAMILIES, 8) | {"cohere": 10, "gemma3_text": 12}


def weight_of(linear: str, parameters: dict[str, Stored]) -> np.ndarray:
    """The weight [N, K] float16 that the arrays of a quantized linear stand for."""
    qweight, qzeros, scales = (parameters[f"{linear}.{part}"].array for part in PARTS)
    plain = dequantize(qweight.view(np.int32), qzeros.view(np.int32), scales, np.float32)
    return plain.T.astype(np.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_converts(mlc_python: Path, tmp_path: Path, family: str) -> None:
    awq, plain = make_awq_pair(make_family(tmp_path / family, family), GROUP_SIZE)
    out = {"q4f16_autoawq_g32": tmp_path / "awq", "q0f16": tmp_path / "plain"}
    for checkpoint, name in ((awq, "q4f16_autoawq_g32"), (plain, "q0f16")):
        words = [checkpoint, "--quantization", name, "-o", out[name]]
        run_step(mlc_python, "convert_weight", *words, "--device", "cpu")
    got, expected = (read_parameters(folder) for folder in out.values())

    linears = [name.removesuffix(".qweight") for name in got if name.endswith(".qweight")]
    assert len(linears) == LINEARS[family]
    for name, stored in expected.items():
        linear = name.removesuffix(".weight")
        if linear in linears:
            found = weight_of(linear, got)
            np.testing.assert_array_equal(found, stored.array, err_msg=name)
            continue
        found = got[name].array
        if found.dtype == np.float32:  # mlc_llm cuts it down to bfloat16 on the disk
            found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, stored.array, err_msg=name)
    triples = {f"{linear}.{part}" for linear in linears for part in PARTS}
    assert set(got) == triples | {name for name in expected if name[:-7] not in linears}

    words = [awq, "--quantization", "q4f16_autoawq_g32", "-o", tmp_path / "awq"]
    run_step(mlc_python, "gen_config", *words)
    content = load_json(out["q4f16_autoawq_g32"] / "mlc-chat-config.json")
    assert content["awq"]["group_size"] == GROUP_SIZE
    assert content["weight_layout"] == "autoawq"
    assert content["model_type"] == family


@pytest.mark.parametrize(("family", "silu"), [("phi3", True), ("gemma", False)])
def test_family_in_the_tiled_layout(
    mlc_python: Path, tmp_path: Path, family: str, silu: bool
) -> None:
    """Gate and up are interleaved where silu follows, and nowhere else."""
    awq, _ = make_awq_pair(make_family(tmp_path / family, family), GROUP_SIZE)
    folders = []
    for layout in ("autoawq", "n16k64"):
        words = ["--quantization", "q4f16_autoawq_g32", "--weight-layout", layout]
        folders.append(tmp_path / layout)
        run_step(mlc_python, "convert_weight", awq, *words, "--device", "cpu", "-o", folders[-1])
    stock, tiled = map(read_parameters, folders)
    assert list(stock) == list(tiled)
    for linear in [name.removesuffix(".qweight") for name in stock if name.endswith(".qweight")]:
        expected = [stock[f"{linear}.{part}"].array for part in PARTS]
        qweight, qzeros, scales = (tiled[f"{linear}.{part}"].array for part in PARTS)
        K, N = expected[0].shape[0], expected[2].shape[1]
        interleaved = silu and linear.endswith("gate_up_proj")
        words_of = (qweight.view(np.int32), qzeros.view(np.int32), scales)
        for got, wanted in zip(untile(*words_of, K, N, interleaved), expected, strict=True):
            assert got.tobytes() == wanted.tobytes(), linear
