"""A whole build, and each step alone, with an mlc_llm that is played."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from awq_checkpoints import make_awq_checkpoint
from built_model import built_tiny_llama
from fake_mlc import FakeMlc
from tiny_models import make_tiny_model

from mlcawq.build.pipeline import BuildRequest, Reporter
from mlcawq.build.via_mlc import pipeline, steps
from mlcawq.build.via_mlc.commands import Extra
from mlcawq.build.via_mlc.pipeline import build, part_config
from mlcawq.build.via_mlc.plan import MlcRequest
from mlcawq.checkpoint.config import parse_config
from mlcawq.errors import UserError
from mlcawq.graph.settings import CompileSettings


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("via") / "llama", layers=1)


@pytest.fixture(scope="module")
def awq(plain: Path) -> Path:
    return make_awq_checkpoint(plain, plain.parent / "awq", 128)[0]


@pytest.fixture
def fake(tmp_path: Path) -> FakeMlc:
    return FakeMlc(tmp_path / "mlc")


def request(fake: FakeMlc, extra: Extra | None = None, **asked: object) -> MlcRequest:
    plugin = bool(asked.pop("plugin", True))
    build = BuildRequest(**asked)  # type: ignore[arg-type]
    return MlcRequest(build, fake.python, plugin, extra or Extra())


class Heard(Reporter):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def test_a_build_appears_whole(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    heard, output = Heard(), io.BytesIO()
    asked = request(fake, Extra(compile=("--opt", "O3")), verify=False)
    result = build(awq, tmp_path / "out", asked, heard, output)
    assert heard.stages == ["mlc_llm gen_config", "mlc_llm convert_weight", "mlc_llm compile"]
    assert b"compile is done" in output.getvalue()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lib-cpu.so",
        "mlc-chat-config.json",
        "params_shard_0.bin",
        "tensor-cache.json",
    ]
    assert (result.library, result.library_bytes, result.weight_bytes) == ("lib-cpu.so", 7, 1000)
    assert result.conv_template == "chatml"
    assert result.sizes == CompileSettings(64, 32, 2)
    assert result.via.startswith("mlc_llm 0.20.0")
    assert result.unverified == "--no-verify"
    # The template travelled as a file that was there, and is gone.
    gen_config, _, compile_ = fake.calls
    assert not Path(gen_config[gen_config.index("--conv-template") + 1]).exists()
    assert compile_[-2:] == ["--opt", "O3"]
    assert json.loads(json.dumps(result.as_json()))["via"] == result.via


@pytest.mark.parametrize("step", ["gen_config", "convert_weight", "compile"])
@pytest.mark.parametrize("play", ["fails", "nothing", "complains"])
def test_a_build_that_fails_leaves_nothing(
    fake: FakeMlc, awq: Path, tmp_path: Path, step: str, play: str
) -> None:
    fake.plays(**{step: play})
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        build(awq, out, request(fake, verify=False), output=io.BytesIO())
    message = str(error.value)
    assert f"mlc_llm {step}" in message
    if play != "complains":
        # What is shown writes where the user wanted it, not where we did.
        assert str(out) in message
        assert ".partial" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["mlc"]


@pytest.mark.parametrize("step", ["gen_config", "convert_weight", "compile"])
def test_an_interrupt_leaves_nothing(
    fake: FakeMlc, awq: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(argv: list[str], *_: object) -> None:
        if step in argv:
            raise KeyboardInterrupt
        subprocess.run(argv, check=True, capture_output=True)

    monkeypatch.setattr(pipeline, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(awq, tmp_path / "out", request(fake, verify=False), output=io.BytesIO())
    assert [path.name for path in tmp_path.iterdir()] == ["mlc"]


def test_an_earlier_folder_stays_where_a_build_fails(
    fake: FakeMlc, awq: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(awq, out, request(fake, verify=False), output=io.BytesIO())
    with pytest.raises(UserError, match="exists and is not empty"):
        build(awq, out, request(fake, verify=False), output=io.BytesIO())
    (out / "marker").touch()
    fake.plays(compile="fails")
    again = request(fake, verify=False, overwrite=True)
    with pytest.raises(UserError, match="no such layer"):
        build(awq, out, again, output=io.BytesIO())
    assert (out / "marker").exists()
    fake.plays()
    build(awq, out, again, output=io.BytesIO())
    assert not (out / "marker").exists()


def test_the_library_is_verified(fake: FakeMlc, tmp_path: Path) -> None:
    checkpoint, built = built_tiny_llama()
    fake.plays(like=str(built))
    asked = request(fake, quantization="q0f32")
    result = build(checkpoint, tmp_path / "out", asked, output=io.BytesIO())
    assert result.verification is not None
    assert result.verification.worst < 1e-4
    assert result.parameters > 0
    # A library of other weights is not put in place.
    other = make_tiny_model(tmp_path / "other", dtype="float32", seed=7)
    with pytest.raises(UserError, match="the library's logits are not the checkpoint's"):
        build(other, tmp_path / "wrong", asked, output=io.BytesIO())
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("tensor_parallel_shards", "tensor_parallel_shards is 2"),
        ("sliding_window_size", "a rolling cache of 2 tokens"),
    ],
)
def test_what_our_engine_does_not_run_is_built_and_not_verified(
    key: str, why: str, fake: FakeMlc, awq: Path, tmp_path: Path
) -> None:
    fake.plays(config={key: 2})
    result = build(awq, tmp_path / "out", request(fake), None, io.BytesIO())
    assert result.verification is None
    assert why in result.unverified
    with pytest.raises(UserError, match="cannot be verified"):
        build(awq, tmp_path / "other", request(fake, verify=True), None, io.BytesIO())
    assert not (tmp_path / "other").exists()


def test_large_models_are_verified_by_a_few_layers(
    fake: FakeMlc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are compiled by what compiled the library, from a config cut to them."""
    checkpoint, built = built_tiny_llama()
    fake.plays(like=str(built))
    monkeypatch.setattr("mlcawq.build.verify.FULL_LIMIT", 1)
    result = build(checkpoint, tmp_path / "out", request(fake), Heard(), io.BytesIO())
    assert result.verification is not None
    assert (result.verification.mode, result.verification.layers) == ("sampled", (0, 1))
    assert [call[1] for call in fake.calls] == [
        "gen_config",
        "convert_weight",
        "compile",
        "compile",
    ]
    part = fake.calls[-1]
    assert part[part.index("--device") + 1] == fake.calls[-2][part.index("--device") + 1]


def test_the_config_of_a_few_layers(tmp_path: Path) -> None:
    model = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "modules_to_not_convert": ["model.layers.1.mlp"],
        },
    }
    part = parse_config(model)
    whole = {
        "model_config": {**model, "num_hidden_layers": 9, "layer_types": ["full_attention"] * 9},
        "awq": {"group_size": 32, "modules_to_not_convert": ["model.layers.8.mlp"]},
        "weight_layout": "autoawq",
    }
    (tmp_path / "mlc-chat-config.json").write_text(json.dumps(whole))
    cut = part_config(tmp_path, part, CompileSettings(64, 32, 2))
    assert cut["model_config"]["num_hidden_layers"] == 2
    assert cut["model_config"]["layer_types"] == ["full_attention"] * 2
    assert cut["context_window_size"] == cut["model_config"]["context_window_size"] == 64
    assert cut["awq"] == {"group_size": 32, "modules_to_not_convert": ["model.layers.1.mlp"]}
    assert cut["weight_layout"] == "autoawq"


def test_an_index_that_mlc_llm_writes_into_the_checkpoint_goes(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(RuntimeError), pipeline.without_litter(tmp_path):
        index.write_text("{}")
        raise RuntimeError
    assert not index.exists()
    index.write_text("{}")
    with pipeline.without_litter(tmp_path):
        pass
    assert index.exists()


def test_the_steps_alone(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = steps.gen_config(awq, out, request(fake, weight_layout="n16k64"))
    assert config.run(output=io.BytesIO()) == out / "mlc-chat-config.json"
    assert "n16k64" in fake.calls[0]

    # What the folder says of the layout holds for the weights too.
    written = json.loads((out / "mlc-chat-config.json").read_text()) | {"weight_layout": "n16k64"}
    (out / "mlc-chat-config.json").write_text(json.dumps(written))
    (out / "params_shard_7.bin").touch()
    weights = steps.convert_weight(awq, out, request(fake))
    assert weights.run(output=io.BytesIO()) == out / "tensor-cache.json"
    assert "n16k64" in fake.calls[1]
    assert not (out / "params_shard_7.bin").exists()
    with pytest.raises(UserError, match="there says n16k64"):
        steps.convert_weight(awq, out, request(fake, weight_layout="autoawq"))
    for step in (steps.gen_config, steps.convert_weight):
        with pytest.raises(UserError, match="which mlc_llm of itself does not know"):
            step(awq, out, request(fake, plugin=False))

    with pytest.raises(UserError, match="no kernels for cpu"):
        steps.compile_(out, None, request(fake))
    with pytest.raises(UserError, match="which mlc_llm of itself does not know"):
        steps.compile_(out, None, request(fake, target="cuda:sm_80", plugin=False))
    (out / "lib-cuda.so").write_text("old")
    library = steps.compile_(out, None, request(fake, target="cuda:sm_80"))
    fake.plays(compile="fails")
    with pytest.raises(UserError, match="no such layer"):
        library.run(output=io.BytesIO())
    assert (out / "lib-cuda.so").read_text() == "old"
    fake.plays()
    assert library.run(output=io.BytesIO()) == out / "lib-cuda.so"
    assert (out / "lib-cuda.so").read_text() == "library"
    away = steps.compile_(out, tmp_path / "away" / "m.tar", request(fake, target="iphone"))
    assert away.run(output=io.BytesIO()) == tmp_path / "away" / "m.tar"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "mlc", "out"]


def test_a_step_shows_what_to_type(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = steps.gen_config(awq, out, request(fake)).typed()
    assert lines[:3] == [
        f"mkdir -p {out}",
        "conversation=$(mktemp)",
        "cat > \"$conversation\" <<'JSON'",
    ]
    assert f"--output {out}" in lines[-2]
    assert len(steps.convert_weight(awq, out, request(fake)).typed()) == 2
    assert fake.calls == []


def test_steps_refuse_before_they_run(fake: FakeMlc, awq: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(awq, copy)
    for step in (steps.gen_config, steps.convert_weight):
        with pytest.raises(UserError, match="the output is the checkpoint"):
            step(copy, copy, request(fake))
        with pytest.raises(UserError, match="no such file"):
            step(tmp_path, tmp_path / "out", request(fake))
    with pytest.raises(UserError, match=r"no mlc-chat-config\.json"):
        steps.compile_(awq, None, request(fake))
    (copy / "mlc-chat-config.json").write_text("{}")
    with pytest.raises(UserError, match="a library is one file"):
        steps.compile_(copy, tmp_path, request(fake))
    assert fake.calls == []
