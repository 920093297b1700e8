"""Tables rounded to 8 and 4 bits: how well, in which layout, and what cannot be rounded."""

from __future__ import annotations

import secrets
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlcawq.build import rounded_table
from mlcawq.build.convert_weight import convert_weight
from mlcawq.build.rounded_table import read_table, round_table
from mlcawq.checkpoint.config import ModelConfig, read_config
from mlcawq.errors import UserError
from mlcawq.graph.tables import PLAIN, Table, Tables, check_tables, choose_tables
from tests.awq_checkpoints import make_awq_checkpoint, round_weight
from tests.build.test_convert_weight import read_parameters
from tests.tiny_models import make_tiny_model
from tir_kernels.int8_weights import dequantize
from tir_kernels.reference import pack, unblock


def weights(rows: int, width: int) -> tuple[np.ndarray, int]:
    """With a group of zeros, one that is all positive, and an outlier; the seed."""
    seed = secrets.randbits(32)
    weight = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    weight[0, :32] = 0
    weight[1, :32] = np.abs(weight[1, :32]) + 1
    weight[2, 3] = 40
    return weight, seed


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("rows", "width", "group"), [(37, 128, 64), (16, 96, 32)])
def test_8_bits(
    dtype: type, rows: int, width: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, seed = weights(rows, width)
    weight = weight.astype(dtype)
    monkeypatch.setattr(rounded_table, "_BLOCK", 16 * width)  # one block of rows at a time
    table = Table(8, group)
    arrays = round_table(weight, table, "float16")
    shapes = table.parameters(rows, width, "float16")
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == shapes
    got = dequantize(arrays["qweight"], arrays["scales"], rows)
    groups = weight.astype(np.float64).reshape(rows, -1, group)
    # Half a step, and what a scale in float16 may miss of the largest.
    bound = np.abs(groups).max(2, keepdims=True) * (0.5 / 127 + 2.0**-11) + 1e-9
    assert (np.abs(got.reshape(groups.shape) - groups) <= bound).all(), seed
    half = read_table(arrays, table, rows)
    np.testing.assert_array_equal(half, got.astype(np.float32).astype(np.float16))


def test_4_bits_find_better_ranges_than_the_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seed = weights(43, 96)
    table = Table(4, 32)
    monkeypatch.setattr(rounded_table, "_BLOCK", 32 * 96)
    arrays = round_table(weight, table, "float16")
    shapes = table.parameters(43, 96, "float16")
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == shapes
    got = read_table(arrays, table, 43).astype(np.float64)
    monkeypatch.setattr(rounded_table, "_STEPS", 1)
    widest = read_table(round_table(weight, table, "float16"), table, 43).astype(np.float64)

    def error(rounded: np.ndarray) -> np.ndarray:
        return np.square(rounded - weight).reshape(43, -1, 32).sum(2)

    assert (error(got) <= error(widest) * 1.001 + 1e-6).all(), seed
    assert error(got).sum() < 0.97 * error(widest).sum(), seed
    # Of the whole range: half a step away at most, where the zero point may be one off.
    low = np.minimum(weight.reshape(43, -1, 32).min(2), 0)
    high = np.maximum(weight.reshape(43, -1, 32).max(2), 0)
    steps = np.abs(widest - weight).reshape(43, -1, 32).max(2) / np.maximum((high - low) / 15, 1e-9)
    assert (steps < 1.02).all(), seed
    # The layout is the one of other 4-bit weights.
    q, _, scales = unblock(arrays["qweight"], arrays["qzeros"], arrays["scales"], 43 + 5)
    assert q.shape == (96, 6)
    assert (scales[:, 43:] == 0).all()


@pytest.mark.parametrize(("head", "value"), [("int8", np.nan), ("int8", np.inf), ("int4", np.nan)])
def test_what_is_not_finite_is_named(tmp_path: Path, head: str, value: float) -> None:
    folder = make_tiny_model(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][5, 7] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight holds values that are not finite"):
        convert_weight(folder, tmp_path / "out", head=head)
    assert list((tmp_path / "out").iterdir()) == []


def test_untied_tables_are_stored_one_by_one(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", dtype="bfloat16")
    convert_weight(folder, tmp_path / "out", head="int4")
    parameters = read_parameters(tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    for name, table in (("model.embed_tokens", Table(8, 128)), ("lm_head", Table(4, 32))):
        weight = state[f"{name}.weight"].float().numpy()
        for kind, array in round_table(weight, table, "float16").items():
            assert parameters[f"{name}.{kind}"].tobytes() == array.tobytes()
        assert f"{name}.weight" not in parameters


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", tie=True)
    convert_weight(folder, tmp_path / "out", head="int8")
    names = set(read_parameters(tmp_path / "out"))
    assert {n for n in names if "embed_tokens" in n} == {
        "model.embed_tokens.qweight",
        "model.embed_tokens.scales",
    }
    assert not any("lm_head" in name for name in names)


def with_own_head(folder: Path, group_size: int = 32) -> Path:
    """The AWQ checkpoint `folder`, its head quantized as its linears are."""
    state = load_file(folder / "model.safetensors")
    weight = state.pop("lm_head.weight").float().numpy().T
    q, zeros, scales = round_weight(weight, group_size, zero_point=True)
    state["lm_head.qweight"] = torch.from_numpy(pack(q))
    state["lm_head.qzeros"] = torch.from_numpy(pack(zeros))
    state["lm_head.scales"] = torch.from_numpy(scales).contiguous()
    save_file(state, folder / "model.safetensors")
    return folder


def test_a_head_that_is_quantized_keeps_its_integers(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    folder = with_own_head(make_awq_checkpoint(plain, tmp_path / "awq", 32)[0])
    convert_weight(folder, tmp_path / "out", weight_layout="n16k8")
    parameters = read_parameters(tmp_path / "out")
    kinds = ("qweight", "qzeros", "scales")
    stock = unblock(*(parameters[f"lm_head.{kind}"].view() for kind in kinds), 400)
    state = load_file(folder / "model.safetensors")
    for kind, array in zip(kinds, stock, strict=True):
        assert array.tobytes() == state[f"lm_head.{kind}"].numpy().tobytes()
    with pytest.raises(UserError, match="quantized to 4 bits, and int8 was asked for"):
        convert_weight(folder, tmp_path / "out", head="int8")


def config_of(tmp_path: Path, **changes: object) -> ModelConfig:
    return read_config(make_tiny_model(tmp_path / "model", **changes))


def test_what_head_stands_for(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    int8, int4 = Table(8, 128), Table(4, 32)

    def chosen(asked: str | None, **options: bool) -> Tables:
        given = {"packed": False, "own": False, **options}
        return choose_tables(config, asked, device="cpu", **given)

    assert chosen(None) == PLAIN
    assert chosen(None, packed=True) == Tables(int8, int8)
    assert chosen("float16", packed=True) == PLAIN
    assert chosen("int8") == Tables(int8, int8)
    assert chosen("int4") == Tables(int4, int8)
    assert Tables.named({**chosen("int4").names(), "weight_layout": "n16k8"}) == chosen("int4")
    with pytest.raises(UserError, match="use float16, int8, int4"):
        chosen("int2")
    for device in ("cuda", "vulkan"):
        with pytest.raises(UserError, match="--head float16, or with --target cpu"):
            choose_tables(config, "int8", packed=False, own=False, device=device)
        check_tables(PLAIN, device)


def test_widths_that_no_group_divides(tmp_path: Path) -> None:
    config = config_of(tmp_path, hidden=80, heads=2, kv_heads=1)
    default = choose_tables(config, None, packed=True, own=False, device="cpu")
    assert default == PLAIN
    with pytest.raises(UserError, match="hidden size of 80 is no multiple of 32"):
        choose_tables(config, "int4", packed=True, own=False, device="cpu")


def test_names_that_mean_nothing() -> None:
    for name in ("int8", "int8_g16", "int3_g32", "", 8, None):
        with pytest.raises(ValueError, match="no way to store a table"):
            Table.named(name)
    assert Table.named(Table(4, 64).name) == Table(4, 64)
