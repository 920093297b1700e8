"""The tensors of a checkpoint against those that a model needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlcawq.build.mlc_plugin.mapping import AwqMapping
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import UserError
from tir_kernels.layouts import ExpertsShape, LinearShape

Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    """q and k of one fused linear [64, 48] with groups of 32, a norm and an embedding."""
    out: Tensors = {
        "norm.weight": np.ones(64, np.float16),
        "embed.weight": np.ones((10, 64), np.float16),
    }
    for name, columns in (("q", 32), ("k", 16)):
        out[f"{name}.qweight"] = np.zeros((64, columns // 8), np.int32)
        out[f"{name}.qzeros"] = np.zeros((2, columns // 8), np.int32)
        out[f"{name}.scales"] = np.ones((2, columns), np.float16)
    return out


def mapping(symmetric: bool = False) -> AwqMapping:
    made = AwqMapping(
        shapes={"norm.weight": (64,), "embed.weight": (None, 64)},
        linears={"qk": LinearShape(64, 48, 32)},
        symmetric=symmetric,
        unused_params={"old.bias"},
    )
    for name in made.shapes:
        made.add_mapping(name, [name], np.asarray)
    for part in ("qweight", "qzeros", "scales"):
        made.add_mapping(f"qk.{part}", [f"q.{part}", f"k.{part}"], np.asarray)
    return made


def reader(folder: Path, content: Tensors) -> TensorReader:
    save_file(content, folder / "model.safetensors")
    return TensorReader(folder)


def test_fitting_checkpoints_pass(tmp_path: Path) -> None:
    extra = {"old.bias": np.ones(1, np.float16), "a.rotary_emb.inv_freq": np.ones(4, np.float32)}
    found = reader(tmp_path, {**tensors(), **extra})
    mapping().check(found)
    assert mapping().float_parameters(found) == 64 + 640 + 64 * 48


def test_experts_take_a_tensor_of_each(tmp_path: Path) -> None:
    content: Tensors = {}
    made = AwqMapping(linears={"moe": ExpertsShape(64, 16, 32, 3)})
    for part, array in (
        ("qweight", np.zeros((64, 2), np.int32)),
        ("qzeros", np.zeros((2, 2), np.int32)),
        ("scales", np.ones((2, 16), np.float16)),
    ):
        names = [f"{expert}.{part}" for expert in range(3)]
        made.add_mapping(f"moe.{part}", names, np.asarray)
        content |= dict.fromkeys(names, array)
    found = reader(tmp_path, content)
    made.check(found)
    assert made.float_parameters(found) == 3 * 64 * 16
    content["1.scales"] = np.ones((2, 8), np.float16)
    with pytest.raises(UserError, match=r"moe\.scales needs 48 columns, found 40"):
        made.check(reader(tmp_path, content))


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    content = tensors()
    del content["q.scales"]
    content |= {"norm.bias": np.ones(1, np.float16), "norm.weight": np.ones(65, np.float16)}
    with pytest.raises(UserError) as error:
        mapping().check(reader(tmp_path, content))
    assert [problem.what for problem in error.value.problems] == [
        "norm.bias is not part of this architecture as config.json describes it",
        "norm.weight needs shape [64], found [65]",
        "tensor q.scales is missing",
    ]


def test_modules_that_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    eyes = {f"eyes.blocks.{i}.weight": np.ones(1, np.float16) for i in range(2)}
    rotary = {"old.rotary_emb.inv_freq": np.ones(4, np.float32)}
    found = reader(tmp_path, {**tensors(), **eyes, **rotary})
    mapping().check(found)
    assert mapping().left_out(found) == ["eyes.blocks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"q.qweight": t["q.qweight"][:32]}, r"expected 64 rows"),
        (lambda t: t | {"k.qweight": t["k.qweight"][:, :1]}, "needs 6 words of 8 columns, found 5"),
        (lambda t: t | {"k.scales": t["k.scales"][:, :1]}, "needs 48 columns, found 33"),
        (lambda t: t | {"q.qzeros": t["q.qzeros"].astype(np.int16)}, "has type I16, expected I32"),
    ],
)
def test_arrays_of_another_size_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    content = {name: np.ascontiguousarray(array) for name, array in change(tensors()).items()}
    with pytest.raises(UserError, match=message):
        mapping().check(reader(tmp_path, content))


def test_symmetric_checkpoints_may_leave_out_zeros(tmp_path: Path) -> None:
    content = {name: array for name, array in tensors().items() if not name.endswith("qzeros")}
    found = reader(tmp_path, content)
    mapping(symmetric=True).check(found)
    assert mapping(symmetric=True).without_missing_zeros(found)["qk.qzeros"] == []
    with pytest.raises(UserError, match=r"tensor q\.qzeros is missing"):
        mapping().check(found)


def test_symmetric_checkpoints_have_all_zeros_or_none(tmp_path: Path) -> None:
    content = tensors()
    del content["k.qzeros"]
    with pytest.raises(UserError, match=r"tensor k\.qzeros is missing"):
        mapping(symmetric=True).check(reader(tmp_path, content))


@pytest.mark.parametrize("tied", [True, False])
def test_head_that_is_not_used_must_be_the_embedding(tmp_path: Path, tied: bool) -> None:
    content = tensors()
    content["lm_head.weight"] = content["embed.weight"] * (1 if tied else 2)
    found = reader(tmp_path, content)
    if tied:
        mapping().check(found)
        return
    with pytest.raises(UserError, match=r"lm_head\.weight is not part of this architecture"):
        mapping().check(found)
