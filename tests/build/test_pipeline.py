"""Whole builds of tiny models: what comes out, what is checked before, what a failure leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from awq_checkpoints import make_awq_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from mlcawq.build import checks, pipeline, verify
from mlcawq.build.convert_weight import convert_weight
from mlcawq.build.cpu_target import cpu_target
from mlcawq.build.pipeline import BuildRequest, BuildResult, build, compile_folder, generate_config
from mlcawq.build.verify import (
    choose_mode,
    num_parameters,
    sample_layers,
    truncated,
    verify_full,
    verify_sampled,
)
from mlcawq.checkpoint.config import AwqConfig, computed_settings, parse_config, read_config
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.engine.artifact import BuiltFolder, read_folder
from mlcawq.errors import UserError
from mlcawq.inspection import describe


@dataclasses.dataclass
class Built:
    checkpoint: Path
    folder: Path
    result: BuildResult


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tiny AWQ qwen3 of three layers, built with everything on."""
    root = tmp_path_factory.mktemp("pipeline")
    plain = make_tiny_model(root / "hf", "qwen3", layers=3, hidden=64, intermediate=128)
    checkpoint, _ = make_awq_checkpoint(plain, root / "awq", 32)
    result = build(checkpoint, root / "out", BuildRequest("cpu:native", context_window_size=256))
    return Built(checkpoint, root / "out", result)


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Path:
    """The built folder, to be broken."""
    return Path(shutil.copytree(built.folder, tmp_path / "copy"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_a_folder_is_built_and_verified(built: Built) -> None:
    names = {path.name for path in built.folder.iterdir()}
    assert names >= {
        "mlc-chat-config.json",
        "tensor-cache.json",
        "params_shard_0.bin",
        "tokenizer.json",
        "lib-cpu.so",
    }
    assert leftovers(built.folder.parent) == []
    assert built.result.quantization == "q4f16_autoawq_g32"
    assert built.result.conv_template == "chatml"
    assert read_folder(built.folder).libraries == {"cpu": built.folder / "lib-cpu.so"}
    verification = built.result.verification
    assert verification is not None
    assert verification.mode == "full"
    assert {(c.prompt, c.path) for c in verification.comparisons} == {
        *((p, w) for p in ("text", "dialogue", "random tokens") for w in WAYS[:2]),
        *((p, WAYS[2]) for p in ("text", "dialogue")),
    }
    assert 0 < verification.worst < 1e-2
    assert json.loads(json.dumps(built.result.as_json()))["verification"]["mode"] == "full"


WAYS = ("prefill in pieces", "prefill and decode", "two sequences at once")


def test_sampled_layers_are_compiled_and_compared(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_SAMPLED_LAYERS", 2)
    said: list[str] = []
    result = verify_sampled(built.folder, built.checkpoint, cpu_target(), said.append)
    assert result.layers == (0, 2)
    assert 0 < result.worst < 1e-2
    assert said[0] == "compiling layers 0, 2 on their own"


def test_what_was_built_is_recognised(built: Built) -> None:
    folder = describe(built.folder)
    assert folder.kind == "an MLC model folder"
    assert folder.problems == []
    assert folder.facts["library for cpu"].endswith("; fits")
    assert folder.facts["bits a parameter"] == round(built.result.bits_per_parameter, 3)
    library = describe(built.folder / "lib-cpu.so")
    assert library.kind == "a compiled model library"
    assert library.facts["quantization"] == "q4f16_autoawq_g32"
    functions = {"embed", "prefill", "batch_decode", "apply_penalty_inplace"}
    assert functions <= set(library.facts["functions"])


def change_weights(folder: Path, name: str, scale: float) -> None:
    """Scale one parameter in a built folder, and make the folder look untouched."""
    import hashlib

    cache = json.loads((folder / "tensor-cache.json").read_text())
    for shard in cache["records"]:
        for record in shard["records"]:
            if record["name"] == name:
                path = folder / shard["dataPath"]
                data = bytearray(path.read_bytes())
                start, end = record["byteOffset"], record["byteOffset"] + record["nbytes"]
                values = np.frombuffer(bytes(data[start:end]), record["dtype"])
                data[start:end] = (values * scale).astype(record["dtype"]).tobytes()
                path.write_bytes(bytes(data))
                shard["md5sum"] = hashlib.md5(data).hexdigest()
                (folder / "tensor-cache.json").write_text(json.dumps(cache))
                return
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.down_proj.scales", "model.layers.0.self_attn.k_norm.weight"]
)
def test_wrong_weights_are_found(built: Built, copy: Path, name: str) -> None:
    change_weights(copy, name, 1.5)
    with pytest.raises(UserError) as error:
        verify_full(copy, built.checkpoint)
    message = str(error.value)
    assert "text, prefill in pieces: the library's logits are not the checkpoint's" in message
    assert "random tokens, prefill and decode" in message
    assert "--no-verify" in message


def test_another_checkpoint_is_found_and_nothing_is_left(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build whose library is wrong fails and leaves no folder: here the library is another's."""
    wrong = Path(shutil.copytree(built.checkpoint, tmp_path / "wrong"))
    state = load_file(wrong / "model.safetensors")
    state["model.layers.1.mlp.gate_proj.scales"] *= 2
    save_file(state, wrong / "model.safetensors")
    original = pipeline.convert_weight
    monkeypatch.setattr(
        pipeline, "convert_weight", lambda folder, *rest, **more: original(wrong, *rest, **more)
    )
    monkeypatch.setattr(
        pipeline,
        "compile_model",
        lambda config, library, *_, **__: shutil.copy(built.folder / "lib-cpu.so", library),
    )
    request = BuildRequest(context_window_size=256)
    with pytest.raises(UserError, match="are not the checkpoint's"):
        build(built.checkpoint, tmp_path / "out", request)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]
    result = build(built.checkpoint, tmp_path / "out", dataclasses.replace(request, verify=False))
    assert result.verification is None


def test_an_interrupt_leaves_nothing(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compile_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(built.checkpoint, tmp_path / "out", BuildRequest())
    assert list(tmp_path.iterdir()) == []


def test_the_steps_alone_make_the_same_folder(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "steps"
    # These steps have no target whose layout they could take of themselves.
    request = BuildRequest(context_window_size=256, weight_layout="n16k8")
    generate_config(built.checkpoint, out, request)
    pipeline.convert_weight(built.checkpoint, out)
    for path in out.iterdir():
        assert path.read_bytes() == (built.folder / path.name).read_bytes()
    assert {p.name for p in built.folder.iterdir()} - {p.name for p in out.iterdir()} == {
        "lib-cpu.so"
    }


def test_compile_needs_a_config(tmp_path: Path, built: Built, copy: Path) -> None:
    with pytest.raises(UserError, match="mlcawq gen-config"):
        compile_folder(tmp_path, None, "cpu")
    with pytest.raises(UserError, match="is a folder"):
        compile_folder(copy, tmp_path, "cpu")


def test_everything_wrong_is_said_at_once(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(built.checkpoint, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    state = load_file(broken / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.qweight"]
    save_file(state, broken / "model.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError) as error:
        request = BuildRequest(target="metal", conv_template="chatlm", context_window_size=-1)
        build(broken, tmp_path / "out", request)
    message = str(error.value)
    for part in (
        "exists and is not empty",
        "target metal is not supported",
        "no C++ compiler",
        "no conversation template 'chatlm'",
        "no tokenizer",
        "context_window_size must be positive",
    ):
        assert part in message
    with pytest.raises(UserError, match=r"up_proj\.qweight is missing"):
        build(broken, tmp_path / "other", BuildRequest())


def test_a_full_disk_and_little_memory_are_seen_before(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(
        checks.psutil,
        "virtual_memory",
        lambda: type("memory", (), {"available": 1000})(),
    )
    with pytest.raises(UserError) as error:
        build(built.checkpoint, tmp_path / "out", BuildRequest())
    assert "GB are free" in str(error.value)
    assert "verification needs" in str(error.value)
    with pytest.raises(UserError) as error:
        build(built.checkpoint, tmp_path / "out", BuildRequest(verify=False))
    assert "verification" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_never_the_output(built: Built) -> None:
    request = BuildRequest(overwrite=True)
    with pytest.raises(UserError, match="would replace the checkpoint"):
        build(built.checkpoint, built.checkpoint, request)
    with pytest.raises(UserError, match="the output is the checkpoint"):
        generate_config(built.checkpoint, built.checkpoint, BuildRequest())


def test_overwrite_replaces_model_folders_only(built: Built, tmp_path: Path) -> None:
    request = BuildRequest(overwrite=True, target="metal")  # refused before anything is written
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="--overwrite replaces model folders only"):
        build(built.checkpoint, tmp_path, request)
    with pytest.raises(UserError, match="would replace the checkpoint"):
        build(built.checkpoint, built.checkpoint.parent, request)
    (tmp_path / "mlc-chat-config.json").touch()
    with pytest.raises(UserError) as error:
        build(built.checkpoint, tmp_path, request)
    assert [problem.where for problem in error.value.problems] == ["--target"]


def test_places_where_nothing_can_be_written(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    steps = (
        lambda out: generate_config(built.checkpoint, out, BuildRequest()),
        lambda out: convert_weight(built.checkpoint, out),
        lambda out: compile_folder(built.folder, out / "lib-cpu.so", "cpu"),
    )
    for step in steps:
        with pytest.raises(UserError, match="is a file; a folder is written here"):
            step(file / "out")

    # What no check of permissions foresees: a file system that refuses.
    def refuse(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    for step in steps[:2]:
        with pytest.raises(UserError, match="nothing can be written there"):
            step(tmp_path / "out")


def test_a_failing_config_leaves_a_folder_as_it_was(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no conversation template"):
        generate_config(built.checkpoint, out, BuildRequest(conv_template="nonsense"))
    assert list(tmp_path.iterdir()) == []


def test_the_mode_follows_the_size(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(built.checkpoint)
    reader = TensorReader(
        make_tiny_model(
            built.folder.parent / "plain", "qwen3", layers=3, hidden=64, intermediate=128
        )
    )
    sizes = [np.prod(reader.info(name).shape) for name in reader.names]
    assert num_parameters(config) == sum(sizes)
    assert choose_mode(config, None) == "full"
    assert choose_mode(config, False) == "off"
    monkeypatch.setattr(verify, "FULL_LIMIT", 1000)
    assert choose_mode(config, None) == "sampled"
    assert choose_mode(config, True) == "full"


def test_a_truncated_model_keeps_what_belongs_to_its_layers(built: Built) -> None:
    config = read_config(built.checkpoint)
    skipped = ("lm_head", "model.layers.2.mlp", "model.layers.1.self_attn")
    config = dataclasses.replace(
        config,
        num_hidden_layers=4,
        layer_types=("full_attention", "full_attention", "sliding_attention", "full_attention"),
        quantization=AwqConfig(4, 32, True, "gemm", skipped),
    )
    part = truncated(config, (0, 2, 3))
    assert part.num_hidden_layers == 3
    assert part.layer_types == ("full_attention", "sliding_attention", "full_attention")
    assert part.quantization is not None
    assert part.quantization.modules_to_not_convert == ("lm_head", "model.layers.1.mlp")
    assert sample_layers(1) == (0,)
    assert sample_layers(2) == (0, 1)
    assert sample_layers(32) == (0, 16, 31)


def test_a_sampled_folder_is_described_as_it_is_compiled(tmp_path: Path) -> None:
    """Windowed layers among others: what is left of them must be the same to both sides."""
    checkpoint = make_tiny_model(
        tmp_path / "hf",
        "qwen2",
        layers=4,
        use_sliding_window=True,
        sliding_window=256,
        max_window_layers=3,
    )
    out = tmp_path / "out"
    generated = generate_config(checkpoint, out, BuildRequest())
    config = read_config(checkpoint)
    assert config.layer_types.count("sliding_attention") == 1
    whole = BuiltFolder(out, generated.config, generated.template.conversation, (), {})
    for layers in ((0, 2, 3), (0, 1)):
        part = truncated(config, layers)
        small = verify.sampled_folder(whole, part, layers, {})
        described = parse_config(small.config["model_config"])
        assert computed_settings(described) == computed_settings(part)
