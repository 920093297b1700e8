"""What is checked before mlc_llm runs, and the plan that follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from awq_checkpoints import make_awq_checkpoint
from fake_mlc import FACTS, FakeMlc
from tiny_models import make_tiny_model

from mlcawq.build.pipeline import BuildRequest
from mlcawq.build.via_mlc.commands import parse_extra
from mlcawq.build.via_mlc.plan import MlcRequest, Plan, check, dry_run
from mlcawq.errors import UserError


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("plan") / "llama", layers=1, config_form=4)


@pytest.fixture(scope="module")
def awq(plain: Path) -> Path:
    return make_awq_checkpoint(plain, plain.parent / "awq", 128)[0]


@pytest.fixture
def fake(tmp_path: Path) -> FakeMlc:
    return FakeMlc(tmp_path / "mlc")


def planned(
    fake: FakeMlc, checkpoint: Path, *, plugin: bool = True, extra: str = "", **asked: Any
) -> Plan:
    request = MlcRequest(BuildRequest(**asked), fake.python, plugin, parse_extra(extra))
    return check(checkpoint, fake.folder / "out", request)


def refusal(fake: FakeMlc, checkpoint: Path, **asked: Any) -> str:
    with pytest.raises(UserError) as error:
        planned(fake, checkpoint, **asked)
    assert not (fake.folder / "calls.jsonl").exists()
    return str(error.value)


def variant(source: Path, out: Path, **changed: Any) -> Path:
    """A checkpoint with another config.json; None removes a key."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text()) | changed
    config = {key: value for key, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_plan_is_what_a_native_build_would_be(fake: FakeMlc, awq: Path) -> None:
    plan = planned(fake, awq, context_window_size=256, max_batch_size=2)
    assert plan.quantization == "q4f16_autoawq"
    assert plan.weight_layout == "autoawq"
    assert plan.sizes == {
        "context_window_size": 256,
        "prefill_chunk_size": 256,
        "max_batch_size": 2,
    }
    assert plan.template.name is None
    assert json.loads(plan.template.text())["name"] == "chatml"
    assert plan.mode == "full"
    assert "conversation template: chatml" in plan.notes
    steps = plan.steps(Path("/out"), "/c.json")
    assert list(steps) == ["gen_config", "convert_weight", "compile"]
    assert str(awq / "model.safetensors") in steps["convert_weight"]
    # GPUs get the layout that their kernels are fastest with.
    assert planned(fake, awq, target="cuda:sm_80").weight_layout == "n16k64"
    assert planned(fake, awq, target="metal").weight_layout == "autoawq"
    # The CPU's own layout, and its heads, are for libraries that are compiled here.
    message = refusal(fake, awq, weight_layout="n16k8")
    assert "for libraries that mlcawq compiles itself" in message
    assert "computes with a plain output head" in refusal(fake, awq, head="int8")
    assert "no activations of int8" in refusal(fake, awq, activations="int8")
    assert "no kv_cache_dtype of int8" in refusal(fake, awq, kv_cache_dtype="int8")


def test_a_dry_run_prints_what_gives_the_same(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    lines = dry_run(planned(fake, awq), out)
    assert lines[0] == f"mkdir -p '{out}'"
    assert lines[1] == "conversation=$(mktemp)"
    assert lines[-1] == 'rm "$conversation"'
    assert json.loads(lines[3])["name"] == "chatml"
    assert '--conv-template "$conversation"' in lines[5]
    assert [line.split()[2] for line in lines[5:8]] == ["gen_config", "convert_weight", "compile"]
    assert f"--output '{out}/lib-cpu.so'" in lines[7]
    out.mkdir()
    assert dry_run(planned(fake, awq), out, overwrite=True)[0] == f"rm -r '{out}'"
    named = dry_run(planned(fake, awq, plugin=False), out)
    assert len(named) == 4
    assert "--conv-template chatml " in named[1]


def test_every_problem_is_named_at_once(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    broken = variant(awq, tmp_path / "broken", model_type="falcon9")
    (broken / "tokenizer.json").unlink()
    (broken / "model.safetensors").unlink()
    (fake.folder / "out").write_text("a file")
    message = refusal(
        fake, broken, target="cdua", quantization="q4f16_autoawq_g32", max_batch_size=0
    )
    for part in (
        "is a file; a folder is written here",
        "did you mean cuda?",
        "no tokenizer",
        "safetensors",
        "does not know model_type 'falcon9' (it knows gemma2, llama, mistral, qwen2)",
        "quantization q4f16_autoawq_g32 was asked for, but the checkpoint is AWQ with group size",
        "max_batch_size must be positive",
    ):
        assert part in message


def test_an_output_is_not_risked(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    copy = variant(awq, tmp_path / "copy")
    request = MlcRequest(BuildRequest(overwrite=True), fake.python)
    with pytest.raises(UserError, match="would replace the checkpoint"):
        check(copy, copy, request)
    with pytest.raises(UserError, match="replaces model folders only"):
        check(copy, fake.folder, request)


def test_a_full_disk_is_seen_before(
    fake: FakeMlc, awq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlcawq.build.checks.free_bytes", lambda path: 1000)
    assert "GB are free" in refusal(fake, awq)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantization": "q4f16_2"}, "did you mean q4f16_1? It knows q0f16, q0f32, q3f16_1"),
        ({"quantization": "q4f16_autoawq"}, "`mlcawq quantize` makes an AWQ checkpoint of it"),
        ({"weight_layout": "autoawq"}, "the weights are not packed by AWQ"),
        ({"conv_template": "nobody's"}, 'no conversation template "nobody\'s"'),
        ({"conv_template": "nobody", "plugin": False}, "mlc_llm has no conversation template"),
    ],
)
def test_options_that_do_not_fit_a_plain_checkpoint(
    asked: dict[str, Any], message: str, fake: FakeMlc, plain: Path
) -> None:
    assert message in refusal(fake, plain, **asked)


def test_options_that_mlc_llm_lacks_are_seen_before(fake: FakeMlc, awq: Path) -> None:
    with pytest.raises(UserError) as error:
        extra = parse_extra("--attention-sink 4", "", "--opts O3 --verbosely=1 --overrides -1")
        check(awq, fake.folder / "out", MlcRequest(BuildRequest(), fake.python, True, extra))
    message = str(error.value)
    assert "has no option --opts for compile\n  -> did you mean --opt?" in message
    assert "has no option --verbosely for compile\n  -> it has --debug-dump" in message
    assert "attention-sink" not in message
    fake.answers(options={})
    assert planned(fake, awq, extra="--unheard-of 1").extra.gen_config == ("--unheard-of", "1")


def test_quantizations_of_mlc_llm(fake: FakeMlc, plain: Path) -> None:
    plan = planned(fake, plain, quantization="q4f16_1")
    words = plan.steps(Path("/out"), "")["convert_weight"]
    assert words[words.index("--source-format") + 1] == "huggingface-safetensor"
    assert "--weight-layout" not in words
    assert (plan.mode, plan.unverified.partition(" ")[0]) == ("off", "q4f16_1")
    assert planned(fake, plain).quantization == "q0f16"
    message = refusal(fake, plain, quantization="q4f16_1", verify=True)
    assert "cannot be verified: q4f16_1 rounds the weights" in message


def test_why_a_library_is_not_verified(fake: FakeMlc, awq: Path) -> None:
    assert planned(fake, awq, verify=False).unverified == "--no-verify"
    assert planned(fake, awq, target="metal").unverified == "mlcawq has no engine for metal"
    assert "no cuda device here" in planned(fake, awq, target="cuda:sm_80").unverified


def test_families_that_only_mlc_llm_knows(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    gemma = variant(awq, tmp_path / "gemma", model_type="gemma2")
    plan = planned(fake, gemma, prefill_chunk_size=64)
    assert plan.quantization == "q4f16_autoawq"
    assert plan.sizes == {
        "context_window_size": None,
        "prefill_chunk_size": 64,
        "max_batch_size": 4,
    }
    assert plan.unverified == "mlcawq has no PyTorch reference of gemma2 to compare it with"
    unknown = variant(awq, tmp_path / "unknown", model_type="lama")
    assert "--gen-config-args '--model-type llama'" in refusal(fake, unknown)
    words = planned(fake, unknown, extra="--model-type llama").steps(Path("/o"), "")["gen_config"]
    assert words[-2:] == ["--model-type", "llama"]
    gptq = variant(awq, tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    assert "already quantized with 'gptq'" in refusal(fake, gptq)


def test_a_window_that_the_context_never_outgrows_does_not_roll(
    fake: FakeMlc, awq: Path, tmp_path: Path
) -> None:
    windowed = variant(awq, tmp_path / "windowed", model_type="mistral", sliding_window=64)
    plan = planned(fake, windowed, extra="--attention-sink-size 2")
    words = plan.steps(Path("/out"), "")["gen_config"]
    assert words[words.index("--context-window-size") + 1] == "64"
    # The user's own arguments come last, and win.
    assert words[-4:] == ["--sliding-window-size", "-1", "--attention-sink-size", "2"]
    plain = planned(fake, variant(awq, tmp_path / "plain", model_type="llama"))
    assert "--sliding-window-size" not in plain.steps(Path("/out"), "")["gen_config"]


def quantized(**changed: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        **changed,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "it would compute with other rotary frequencies\n  -> leave --no-plugin out: the "
            'plug-in does; or add "rope_theta": 500000.0 to config.json',
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            'add "rope_scaling" with the rest of rope_parameters',
        ),
        ({"model_type": "mistral"}, "cannot load AWQ weights of mistral (it can of llama)"),
        (
            {"quantization_config": quantized(zero_point=False)},
            "loads AWQ weights with zero points only",
        ),
        (
            {"quantization_config": quantized(modules_to_not_convert=["mlp.down_proj", "lm_head"])},
            "every linear of a block for quantized, and mlp.down_proj is not",
        ),
    ],
)
def test_what_mlc_llm_of_itself_gets_wrong_is_refused(
    config: dict[str, Any], message: str, fake: FakeMlc, awq: Path, tmp_path: Path
) -> None:
    changed = variant(awq, tmp_path / "changed", **config)
    assert message in refusal(fake, changed, plugin=False)


def test_what_mlc_llm_of_itself_can_do(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    plan = planned(fake, awq, plugin=False)
    assert plan.template.name == "chatml"
    config = quantized(modules_to_not_convert=["lm_head"])
    heads = variant(awq, tmp_path / "heads", quantization_config=config)
    assert planned(fake, heads, plugin=False).weight_layout == "autoawq"
    message = refusal(fake, awq, plugin=False, weight_layout="n16k64", target="cuda:sm_80")
    assert "no layout n16k64 without the plug-in" in message
    # A name that only mlc_llm has goes to it as it is.
    assert planned(fake, awq, conv_template="olmo", plugin=False).template.name == "olmo"


def test_a_group_size_that_mlc_llm_lacks(fake: FakeMlc, plain: Path, tmp_path: Path) -> None:
    fine = make_awq_checkpoint(plain, tmp_path / "g32", 32)[0]
    assert planned(fake, fine).quantization == "q4f16_autoawq_g32"
    assert planned(fake, fine, quantization="q4f32_autoawq_g32").mode == "full"
    assert "only q4f16_autoawq (group size 128)" in refusal(fake, fine, plugin=False)


def test_a_template_that_mlc_llm_has_no_name_for(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    fake.answers(conv_templates=["olmo"])
    message = refusal(fake, awq, plugin=False)
    assert "no conversation template for this model's own" in message
    assert "choose one with --conv-template (olmo)" in message


def test_tables_that_could_not_be_read_forbid_nothing(fake: FakeMlc, awq: Path) -> None:
    fake.answers(models=None, awq_models=None, quantizations=None, conv_templates=None)
    assert planned(fake, awq).quantization == "q4f16_autoawq"
    assert "mlc_llm has no conversation template" in refusal(fake, awq, plugin=False)


def test_warnings_about_the_environment_reach_the_user(fake: FakeMlc, awq: Path) -> None:
    versions = {**FACTS[1]["versions"], "apache-tvm-ffi": "0.1.15.post1"}
    fake.answers(tvm_ffi="0.1.15.post1", versions=versions)
    notes = planned(fake, awq).notes
    assert any("warning: apache-tvm-ffi 0.1.15.post1 crashes" in note for note in notes)
