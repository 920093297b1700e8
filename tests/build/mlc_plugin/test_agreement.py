"""A checkpoint and the quantization that was named for it: whether they are the same thing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlcawq.build.mlc_plugin.agreement import settle
from mlcawq.errors import UserError


@dataclasses.dataclass
class Quantization:
    name: str = "q4f16_autoawq"
    kind: str = "awq"
    group_size: int = 128
    weight_layout: str = "autoawq"
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()


DENSE = Quantization("q4f16_1", "group-quant")
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def raw(**changes: Any) -> dict[str, Any]:
    return {"model_type": "phi3", "quantization_config": {**AWQ, **changes}}


def test_settings_of_the_checkpoint_are_taken_over() -> None:
    given = raw(zero_point=False, modules_to_not_convert=["o_proj"])
    settled = settle(Quantization(), given, "config.json", "n16k64")
    assert settled == Quantization(
        weight_layout="n16k64", zero_point=False, modules_to_not_convert=("o_proj",)
    )


def test_other_quantizations_are_mlc_llm_s_own_business() -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    assert settle(DENSE, fp8, "config.json") is DENSE
    assert settle(DENSE, {}, "config.json") is DENSE


@pytest.mark.parametrize(
    ("quantization", "given", "message"),
    [
        (Quantization(), {}, "this one is not quantized"),
        (Quantization(), raw(quant_method="gptq"), "this one is quantized with 'gptq'"),
        (Quantization(), raw(group_size=32), r"use --quantization q4f16_autoawq_g32 or q4f32"),
        (Quantization(), raw(bits=3), "AWQ with 3 bits is not supported"),
        (Quantization(), raw(version="gemv"), "storage version 'gemv' is not supported"),
        (Quantization(), raw(version="gemv_fast"), "'gemv_fast' is not supported"),
        (Quantization(), raw(version="marlin"), "storage version 'marlin' is not supported"),
        (DENSE, raw(), "q4f16_1 cannot be made of it"),
    ],
)
def test_what_does_not_fit_is_refused(
    quantization: Quantization, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        settle(quantization, given, "folder/config.json")
    assert error.value.problems[0].where == "folder/config.json"


def test_every_unsupported_setting_is_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        settle(Quantization(), raw(bits=3, group_size=256, version="gemv"), "config.json")
    assert len(error.value.problems) == 3


def test_layouts_are_for_awq() -> None:
    with pytest.raises(UserError, match="a weight layout is for AWQ, and q4f16_1 is not"):
        settle(DENSE, {}, "config.json", "n16k64")
    with pytest.raises(UserError, match="for libraries that mlcawq compiles itself"):
        settle(Quantization(), raw(), "config.json", "n16k8")
