"""Reports as data: what survives a file, what is added up, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_reports import block, linear, report

from mlcawq.errors import UserError
from mlcawq.quantize.patterns import kind_of
from mlcawq.quantize.report import REPORT_FILE, BlockReport, Report, Spread, read_report


def test_spread_of_a_tensor() -> None:
    values = torch.arange(101.0).flip(0).view(1, 101)
    assert Spread.of(values) == Spread(0.0, 5.0, 50.0, 95.0, 100.0, 50.0)
    assert Spread.of(torch.tensor([3.0])) == Spread(3.0, 3.0, 3.0, 3.0, 3.0, 3.0)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    given = report(3, experts=4, warnings=("a text",))
    (tmp_path / REPORT_FILE).write_text(json.dumps(given.to_json()))
    assert read_report(tmp_path) == read_report(tmp_path / REPORT_FILE) == given


def test_reports_of_other_versions_are_read() -> None:
    """Without what an older one did not write, with what a later one does."""
    content = json.loads(json.dumps(report().to_json()))
    for key in ("storage", "warnings", "run", "format"):
        del content[key]
    for entry in content["blocks"]:
        entry["linears"] = [
            {key: one[key] for key in ("name", "nearest", "found")} for one in entry["linears"]
        ]
    found = Report.from_json({**content, "invented later": 1})
    assert found.run is None
    assert found.blocks[0].linears[0].bits is None
    assert found.bits_per_weight() is None


def test_errors_are_averaged_by_kind_over_layers_and_experts() -> None:
    blocks = tuple(
        replace(
            block(i),
            linears=(
                linear("mlp.experts.0.up_proj", 0.3, 0.1),
                linear("mlp.experts.11.up_proj", 0.4, 0.7),
            ),
        )
        for i in range(2)
    )
    (mean,) = report(blocks=blocks).mean_errors()
    assert mean.name == "mlp.experts.*.up_proj"
    assert mean.nearest == pytest.approx((0.125) ** 0.5)
    assert mean.found == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("block_sparse_moe.experts.7.w1", "block_sparse_moe.experts.*.w1"),
        ("mlp.fc1", "mlp.fc1"),
        ("h.2", "h.*"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_head_is_a_block_of_one_linear() -> None:
    head = BlockReport("lm_head", 0.05, (linear("lm_head"),))
    given = report(1, blocks=(block(0), head))
    assert [made.is_head for made in given.blocks] == [False, True]
    assert [name for name, _ in given.linears][-2:] == ["model.layers.0.mlp.down_proj", "lm_head"]


def test_bits_a_weight_count_scales_and_zero_points() -> None:
    assert report().bits_per_weight() == pytest.approx(8 * 532 / 1024)


def test_warnings_name_their_block() -> None:
    blocks = (replace(block(0), warnings=("mlp.up_proj: NaN",)), block(1))
    given = report(blocks=blocks, warnings=("short text",))
    assert given.all_warnings() == ["short text", "model.layers.0: mlp.up_proj: NaN"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"no {REPORT_FILE} in it"),
        ("{", "not a report"),
        ("[]", "not a report"),
        ('{"model": "a"}', "not a report"),
        ("\xff", "not a report"),
    ],
)
def test_what_is_no_report(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / REPORT_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_report(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_report(tmp_path / "absent")
