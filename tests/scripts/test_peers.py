"""Our AWQ folders and AutoAWQ 0.2.9: needs its environment (scripts/peers/setup_autoawq.sh)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny_model

from mlcawq.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from compare_awq import Setting, compare
from peers.runners import AutoAwq

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def autoawq() -> AutoAwq:
    try:
        return AutoAwq()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_autoawq_reads_our_weights_as_we_do(autoawq: AutoAwq, family: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", family)
    tokens = np.random.default_rng(0).integers(3, 390, (8, 64))
    setting = Setting(128, tokens, tokens[:, :48])
    work = tmp_path / "work"
    work.mkdir()
    result = compare(model, [4], setting, autoawq, work, factor=16)
    assert (
        len(result.verdicts) == 4
    )  # each of them a check that raises where AutoAWQ reads otherwise
    kl = {(row.variant, row.method): row.kl for row in result.rows}
    assert kl["outliers x16", "awq"] < kl["outliers x16", "rtn"]
