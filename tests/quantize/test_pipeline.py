"""A whole quantization of small models, judged by rules that are written out here again."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlcawq.checkpoint.config import read_config
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.families import linear_shapes
from mlcawq.quantize import budget
from mlcawq.quantize.calibration import BUNDLED, CalibrationData, load_calibration
from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint
from mlcawq.quantize.progress import Silent
from mlcawq.quantize.recipe import Recipe, load_recipe
from mlcawq.quantize.report import REPORT_FILE, BlockReport


@pytest.fixture(scope="module")
def calibration() -> CalibrationData:
    return load_calibration(BUNDLED, make_tokenizer(), samples=8, seq_len=64)


def _recipe(shipped: str = "awq", **options: Any) -> Recipe:
    return load_recipe(shipped, {"group_size": 64, **options})


def _unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, with weights [N, K] made by the rule of AWQ storage alone."""
    tensors = load_file(folder / "model.safetensors")
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            values = []
            for words in (tensor, tensors[prefix + "qzeros"]):
                bits = words.numpy().astype(np.int64) & 0xFFFFFFFF
                columns = np.zeros((bits.shape[0], bits.shape[1] * 8))
                for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    columns[:, column::8] = (bits >> (4 * i)) & 15
                values.append(columns)
            scales = tensors[prefix + "scales"].double().numpy()
            group = tensor.shape[0] // scales.shape[0]
            weight = (values[0] - values[1].repeat(group, 0)) * scales.repeat(group, 0)
            result[prefix + "weight"] = torch.from_numpy(weight.T.astype(np.float32))
        elif not name.endswith((".qzeros", ".scales")):
            result[name] = tensor.float()
    return result


def _divergence(model: Path, other: Path, sequences: tuple[torch.Tensor, ...]) -> float:
    batches = [sequence.unsqueeze(0) for sequence in sequences]
    pairs = zip(
        StreamedModel(model).logits(batches), StreamedModel(other).logits(batches), strict=True
    )
    total = [
        (p.log_softmax(-1).exp() * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
        for p, q in pairs
    ]
    return float(torch.stack(total).mean())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"outliers": 30.0}),
        ("qwen2", {"outliers": 30.0, "tie": True, "dtype": "bfloat16"}),
    ],
)
def test_folder_holds_what_the_report_claims(
    tmp_path: Path, calibration: CalibrationData, family: str, options: dict[str, Any]
) -> None:
    """Unpacked by the storage rule, each linear's output error is the one in the report.

    A scale sits in the norm before q, k, v, gate and up: the ratio of the norms gives it. That of
    o and down sits in the rows of v and up: it is the factor that fits their outputs best.
    """
    source = make_tiny_model(tmp_path / "model", family, **options)
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, _recipe(propagate="original"), calibration)
    found = _unpacked(out)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, arguments: inputs.__setitem__(name, arguments[0].flatten(0, -2))

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(torch.stack(calibration.sequences))

    original = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for block in report.blocks:
        rows: dict[str, torch.Tensor] = {}
        for linear in block.linears:
            name = f"{block.name}.{linear.name}"
            kind = linear.name.rpartition(".")[2]
            x = inputs[name]
            if kind in ("o_proj", "down_proj"):
                scale = rows["v_proj" if kind == "o_proj" else "up_proj"]
                if kind == "o_proj":  # 4 query heads read 2 value heads
                    scale = scale.view(2, 1, -1).expand(2, 2, -1).reshape(-1)
            else:
                norm = "input_layernorm" if "attn" in linear.name else "post_attention_layernorm"
                norm = f"{block.name}.{norm}.weight"
                scale = original[norm] / found[norm]
            y = x @ original[f"{name}.weight"].T
            z = (x / scale) @ found[f"{name}.weight"].T
            if kind in ("v_proj", "up_proj"):
                rows[kind] = (y * z).sum(0) / z.square().sum(0)
                z = z * rows[kind]
            error = float((z - y).norm() / y.norm())
            assert error == pytest.approx(linear.found, rel=0.03), name
            if options["outliers"] > 1 and kind in ("q_proj", "gate_proj"):
                assert linear.found < 0.8 * linear.nearest, name


def test_better_than_rounding_to_nearest(tmp_path: Path, calibration: CalibrationData) -> None:
    """With outlier channels made by a rescaling that keeps the function; at 4 and at 3 bits."""
    source = make_tiny_model(tmp_path / "model", outliers=30.0)
    divergence = {}
    for bits in (4, 3):
        for method in ("awq", "rtn"):
            out = tmp_path / f"{method}-{bits}"
            recipe = _recipe(method, bits=bits)
            report = quantize_checkpoint(source, out, recipe, calibration, fmt="fake")
            divergence[method, bits] = report.measured.kl
            measured = _divergence(source, out, calibration.held_out)
            assert report.measured.kl == pytest.approx(measured, rel=0.05)
        assert divergence["awq", bits] < 0.6 * divergence["rtn", bits]


def test_compensated_rounding_is_closer_to_the_original(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model", outliers=30.0)
    error = {}
    for method in ("rtn", "gptq", "awq", "awq+gptq"):
        out = tmp_path / method
        report = quantize_checkpoint(source, out, _recipe(method), calibration)
        error[method] = [block.error for block in report.blocks]
        assert report.recipe["name"] == method
        state = load_file(out / "model.safetensors")
        assert state["model.layers.0.mlp.down_proj.qweight"].dtype == torch.int32
    assert max(error["gptq"]) < 0.9 * max(error["rtn"])
    assert max(error["awq+gptq"]) < 0.9 * max(error["awq"])


def test_following_the_original_survives_an_interruption(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    """What the original model makes of the text is kept from block to block, too."""
    source = make_tiny_model(tmp_path / "model", layers=3)

    class Impatient(Silent):
        def block_done(self, report: BlockReport) -> None:
            raise KeyboardInterrupt

    recipe = _recipe("awq+gptq")
    quantize_checkpoint(source, tmp_path / "whole", recipe, calibration)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(
                source, tmp_path / "parts", recipe, calibration, progress=Impatient()
            )
    quantize_checkpoint(source, tmp_path / "parts", recipe, calibration)
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    alone = _recipe("awq+gptq", compensation={"towards_original": 0})
    quantize_checkpoint(source, tmp_path / "alone", alone, calibration)
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() != whole.read_bytes()


@pytest.mark.parametrize("objective", ["block", "linear"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_way_beats_rounding(
    tmp_path: Path, calibration: CalibrationData, objective: str, symmetric: bool
) -> None:
    source = make_tiny_model(tmp_path / "model", outliers=30.0)
    recipe = _recipe(symmetric=symmetric, scale={"objective": objective})
    report = quantize_checkpoint(source, tmp_path / "out", recipe, calibration)
    for linear in report.mean_errors():
        assert linear.found < linear.nearest
    if symmetric:
        zeros = load_file(tmp_path / "out" / "model.safetensors")
        zeros = {name: tensor for name, tensor in zeros.items() if name.endswith("qzeros")}
        assert zeros
        for tensor in zeros.values():
            assert (tensor.numpy().view(np.uint32) == 0x88888888).all()


@pytest.mark.parametrize("form", [4, 5])
def test_complete_folder(tmp_path: Path, calibration: CalibrationData, form: int) -> None:
    source = make_tiny_model(tmp_path / "model", "qwen3", config_form=form, rope="yarn", bias=True)
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, _recipe(), calibration)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    # Both generations of transformers find what they look for.
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4.0
    read = AutoConfig.from_pretrained(out)
    assert read.rope_parameters == AutoConfig.from_pretrained(source).rope_parameters
    assert AutoTokenizer.from_pretrained(out)("fox").input_ids
    assert (out / "chat_template.jinja").exists()
    assert (out / "generation_config.json").exists()
    assert json.loads((out / REPORT_FILE).read_text())["measured"]["kl"] == report.measured.kl
    card = (out / "README.md").read_text()
    assert f"{1000 * report.measured.kl:.3f}" in card
    stored = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float16", "torch.int32"}
    assert sorted(_unpacked(out)) == sorted(load_file(source / "model.safetensors"))
    # What is measured is what is written.
    assert report.measured.kl == pytest.approx(
        _divergence(source, out, calibration.held_out), rel=0.05
    )


def test_linears_can_be_kept(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model", outliers=10.0)
    recipe = _recipe(modules_to_not_convert=["lm_head", "v_proj", "layers.1.mlp"])
    report = quantize_checkpoint(source, tmp_path / "out", recipe, calibration)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.self_attn.v_proj.weight"].dtype == torch.float16
    assert "model.layers.0.mlp.up_proj.qweight" in stored
    assert "model.layers.1.mlp.up_proj.weight" in stored
    assert report.measured.kl == pytest.approx(
        _divergence(source, tmp_path / "out", calibration.held_out), rel=0.05
    )


def test_same_input_same_bytes(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model")
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name, _recipe(), calibration)
    reports = []
    for path in (tmp_path / "a").iterdir():
        other = tmp_path / "b" / path.name
        if path.name == REPORT_FILE:  # equal but for times and memory
            reports = [json.loads(file.read_text()) for file in (path, other)]
        else:
            assert path.read_bytes() == other.read_bytes(), path.name
    assert all(report.pop("run")["total"]["seconds"] > 0 for report in reports)
    assert reports[0] == reports[1]


def test_finished_output_is_recognized(tmp_path: Path, calibration: CalibrationData) -> None:
    """Killed after the output was placed and before the journal was removed: nothing to do."""
    source = make_tiny_model(tmp_path / "model")
    first = quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    (tmp_path / ".out.mlcawq-work").mkdir()
    assert quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    with pytest.raises(UserError, match="not empty"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(bits=4, symmetric=True), calibration)


def test_only_what_a_killed_run_left_is_cleared(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    ours, users = tmp_path / ".out.old-abc", tmp_path / ".out.old-notes"
    (ours / "out").mkdir(parents=True)
    users.mkdir()
    (users / "file").write_text("mine")
    (tmp_path / ".out.partial-xyz").mkdir()
    quantize_checkpoint(model, tmp_path / "out", _recipe(), calibration)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.old-notes", "model", "out"]
    assert (users / "file").read_text() == "mine"


def _damage(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_is_not_a_number_is_named(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    _damage(source, name, float("nan"))
    with pytest.raises(UserError, match=name):
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_named(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model", dtype="float32")
    _damage(source, "lm_head.weight", 1e6)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert not (tmp_path / "out").exists()


def test_all_linears_that_do_not_divide_are_named(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model", hidden=96, intermediate=100, heads=4, kv_heads=1)
    with pytest.raises(UserError) as caught:
        quantize_checkpoint(source, tmp_path / "out", _recipe(group_size=128), calibration)
    text = str(caught.value)
    assert len(caught.value.problems) == 8  # seven inputs, and the outputs of gate and up
    assert "model.layers.*.self_attn.q_proj: in_features 96" in text
    assert "--group-size 32" in text
    assert "out_features 100 is not a multiple of 8" in text
    assert "--keep gate_proj --keep up_proj" in text


def test_memory_is_flat_from_block_to_block(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model", layers=6)
    held: list[int] = []

    class Watch(Silent):
        def block_done(self, report: BlockReport) -> None:
            gc.collect()
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            storages = {
                x.data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta
            }
            held.append(sum(storages.values()))

    quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration, progress=Watch())
    block = sum(k * n for k, n in linear_shapes(read_config(source)).values()) * 4
    assert len(held) == 6
    assert max(held[1:]) - min(held[1:]) < 0.05 * block


def test_three_bits_need_the_fake_format(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"--format compressed-tensors or fake"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(bits=3), calibration)


def test_quantized_input_is_refused(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model")
    quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    with pytest.raises(UserError, match="already quantized"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", _recipe(), calibration)


def test_too_little_memory_or_disk_is_said_before_work(
    tmp_path: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(budget, "free_bytes", lambda _: 10)
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    with pytest.raises(UserError) as caught:
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert [problem.where for problem in caught.value.problems] == [
        "memory",
        str(tmp_path / "out"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk_leaves_nothing_half_written(
    tmp_path: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fills while the output is written, the finished blocks stay for the rerun."""
    source = make_tiny_model(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlcawq.quantize.output.copy_side_files", full)
        with pytest.raises(UserError, match="disk is full"):
            quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.mlcawq-work", "model"]
    quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_missing_tokenizer(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)


def test_everything_in_the_way_is_said_at_once(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    (source / "model.safetensors").write_bytes(b"")
    (tmp_path / "out").touch()
    with pytest.raises(UserError) as caught:
        quantize_checkpoint(source, tmp_path / "out", _recipe(bits=3), calibration)
    text = str(caught.value)
    for part in ("no tokenizer", "3", "only 0 bytes", "is a file"):
        assert part in text


def test_tensors_are_checked_before_any_text_is_read(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: tensor is missing"):
        check_checkpoint(source, tmp_path / "out", _recipe())


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_original_is_never_replaced(
    tmp_path: Path, calibration: CalibrationData, overwrite: bool
) -> None:
    source = make_tiny_model(tmp_path / "models" / "model")
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", tmp_path / "models"):
        with pytest.raises(UserError, match="would replace the original"):
            quantize_checkpoint(source, out, _recipe(), calibration, overwrite=overwrite)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(UserError, match="model folders only" if overwrite else "not empty"):
        quantize_checkpoint(source, tmp_path / "mine", _recipe(), calibration, overwrite=overwrite)


def test_a_finished_output_without_its_weights_is_not_finished(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model")
    quantize_checkpoint(source, tmp_path / "out", _recipe("rtn"), calibration)
    weights = tmp_path / "out" / "model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match="--overwrite"):
        quantize_checkpoint(source, tmp_path / "out", _recipe("rtn"), calibration)
    quantize_checkpoint(source, tmp_path / "out", _recipe("rtn"), calibration, overwrite=True)
    assert weights.exists()
    # What is copied from the original counts as well.
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="--overwrite"):
        quantize_checkpoint(source, tmp_path / "out", _recipe("rtn"), calibration)


def test_a_tokenizer_of_another_model_is_said(tmp_path: Path, calibration: CalibrationData) -> None:
    source = make_tiny_model(tmp_path / "model", vocab_size=100)
    with pytest.raises(UserError, match="the model knows 100 tokens"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)


def test_measured_in_pieces_is_measured_alike(
    tmp_path: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_model(tmp_path / "model")
    found = []
    for tokens in (512, 7):
        monkeypatch.setattr("mlcawq.quantize.measuring.LOGIT_TOKENS", tokens)
        out = tmp_path / str(tokens)
        found.append(quantize_checkpoint(source, out, _recipe("rtn"), calibration).measured)
    assert found[0].tokens == found[1].tokens
    for key in ("kl", "agreement", "perplexity", "original_perplexity"):
        assert getattr(found[0], key) == pytest.approx(getattr(found[1], key), rel=1e-3)


def test_a_kept_linear_need_not_divide(tmp_path: Path, calibration: CalibrationData) -> None:
    """What the message about a linear that does not divide advises works."""
    source = make_tiny_model(tmp_path / "model", intermediate=104)
    with pytest.raises(UserError, match=r"--keep mlp\.down_proj"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(group_size=32), calibration)
    recipe = _recipe(group_size=32, modules_to_not_convert=["lm_head", "mlp.down_proj"])
    report = quantize_checkpoint(source, tmp_path / "out", recipe, calibration)
    assert "mlp.down_proj" not in {linear.name for linear in report.mean_errors()}
    assert report.measured.kl == pytest.approx(
        _divergence(source, tmp_path / "out", calibration.held_out), rel=0.05
    )


def test_keeping_the_first_block_hides_no_other(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model", intermediate=104)
    recipe = _recipe(group_size=32, modules_to_not_convert=["layers.0."])
    with pytest.raises(UserError, match="in_features 104"):
        quantize_checkpoint(source, tmp_path / "out", recipe, calibration)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["lm_head", "dwon_proj"], "did you mean down_proj"), (["_proj"], "nothing is")],
)
def test_names_to_keep_that_cannot_be_meant(
    tmp_path: Path, calibration: CalibrationData, names: list[str], message: str
) -> None:
    source = make_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        recipe = _recipe(modules_to_not_convert=names)
        quantize_checkpoint(source, tmp_path / "out", recipe, calibration)


def test_a_block_that_adds_nothing(tmp_path: Path, calibration: CalibrationData) -> None:
    """Models are made deeper by blocks whose last linears start as zeros."""
    source = make_tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{linear}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize_checkpoint(source, tmp_path / "out", _recipe(), calibration)
    assert report.blocks[1].error == pytest.approx(0.0, abs=1e-6)


def test_rotation_is_folded_into_a_plain_folder(
    tmp_path: Path, calibration: CalibrationData
) -> None:
    """transformers loads the result as any other, with a head of its own, as it was measured."""
    source = make_tiny_model(tmp_path / "model", tie=True)
    recipe = _recipe(group_size=32, rotation={"seed": 1})
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, recipe, calibration, fmt="fake")
    assert any("head" in warning for warning in report.warnings)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with torch.no_grad():
        original, quantized = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for folder in (source, out)
        )
        kls = []
        for ids in calibration.held_out:
            expected, found = (
                model(ids.unsqueeze(0)).logits[0].log_softmax(-1) for model in (original, quantized)
            )
            kls.append((expected.exp() * (expected - found)).sum(-1))
    kl = float(torch.cat(kls).mean())
    assert kl == pytest.approx(report.measured.kl, rel=0.02)
    norm = quantized.model.layers[0].input_layernorm.weight
    assert torch.equal(quantized.model.norm.weight, torch.ones_like(norm))


def test_rotation_is_refused_before_work(tmp_path: Path) -> None:
    source = make_tiny_decoder(tmp_path / "model", "stablelm")
    with pytest.raises(UserError, match="LayerNorm is none"):
        check_checkpoint(source, tmp_path / "out", _recipe(group_size=32, rotation={}), "fake")
