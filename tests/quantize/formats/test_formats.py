"""What each format holds, what its config says, and folders that are not as their config says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlcawq.checkpoint.single_file import SingleFileWriter
from mlcawq.checkpoint.stored import StoredTensors
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import UserError
from mlcawq.quantize.formats import FORMATS, find_format, stored_format
from mlcawq.quantize.formats.awq import short_names
from mlcawq.quantize.formats.base import LinearSpec
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="wants compressed-tensors"
)
READABLE = [
    pytest.param(name, marks=needs_library if name == "compressed-tensors" else ())
    for name in FORMATS
    if name != "fake"
]


def _specs(**changes: LinearSpec) -> dict[str, LinearSpec]:
    """Two blocks of two linears at 4 bits in groups of 128; `changes` by the linears' last name."""
    usual = LinearSpec(256, 128, IntegerGrid(4, 128))
    return {
        f"model.layers.{i}.{part}": changes.get(part.rpartition(".")[2], usual)
        for i in range(2)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }


def _weight(spec: LinearSpec, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    grid, shape = spec.grid, (spec.groups, spec.out_features)
    codes = torch.randint(
        0, grid.levels + 1, (spec.in_features, spec.out_features), generator=generator
    )
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator)
    if grid.symmetric:
        zero = torch.full(shape, 2 ** (grid.bits - 1))
    scale = torch.rand(shape, generator=generator) * 0.05 + 0.001
    return QuantizedWeight(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid)


def _folder(
    folder: Path, name: str, specs: dict[str, LinearSpec]
) -> tuple[dict, dict[str, QuantizedWeight]]:
    """A folder of those linears in the format of that name: its quantization_config, weights."""
    weights = {linear: _weight(spec, i) for i, (linear, spec) in enumerate(specs.items())}
    tensors = {"model.norm.weight": torch.ones(8)}
    for linear, weight in weights.items():
        tensors |= FORMATS[name].tensors(linear, weight, specs[linear])
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = FORMATS[name].quantization_config(specs, ["lm_head"])
    assert config is not None
    return config, weights


@pytest.mark.parametrize("name", READABLE)
def test_a_folder_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    config, weights = _folder(tmp_path, name, _specs())
    assert stored_format(config) is FORMATS[name]
    stored = StoredTensors(TensorReader(tmp_path), config)
    assert stored.names == sorted(["model.norm.weight", *(f"{key}.weight" for key in weights)])
    for linear, weight in weights.items():
        found = stored.quantized(linear)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.zero, weight.zero)
        assert torch.equal(found.scale, weight.scale)
        assert torch.equal(stored.as_stored(f"{linear}.weight"), weight.dequantized().T)


@needs_library
def test_compressed_tensors_holds_every_kind_of_integers_side_by_side(tmp_path: Path) -> None:
    specs = _specs(down_proj=LinearSpec(256, 128, IntegerGrid(3, 256, symmetric=True)))
    specs["model.layers.1.self_attn.q_proj"] = LinearSpec(256, 128, IntegerGrid(8, 64))
    assert not list(FORMATS["compressed-tensors"].problems(specs))
    config, weights = _folder(tmp_path, "compressed-tensors", specs)
    groups = config["config_groups"].values()
    found = [(g["targets"], g["weights"]["num_bits"], g["weights"]["strategy"]) for g in groups]
    assert found == [
        (["Linear"], 3, "channel"),
        (["model.layers.0.self_attn.q_proj"], 4, "group"),
        (["model.layers.1.self_attn.q_proj"], 8, "group"),
    ]
    stored = StoredTensors(TensorReader(tmp_path), config)
    assert stored.linears == specs
    for linear, weight in weights.items():
        assert torch.equal(stored.quantized(linear).dequantized(), weight.dequantized())


@needs_library
def test_linears_alike_in_all_blocks_are_one_target() -> None:
    specs = _specs(q_proj=LinearSpec(256, 128, IntegerGrid(8, 128)))
    specs["model.layers.2.mlp.down_proj"] = specs["model.layers.0.mlp.down_proj"]
    config = FORMATS["compressed-tensors"].quantization_config(specs, ["lm_head"])
    assert config is not None
    (target,) = config["config_groups"]["group_1"]["targets"]
    assert re.match(target.removeprefix("re:"), "model.layers.31.self_attn.q_proj")
    assert not re.match(target.removeprefix("re:"), "model.layers.31.self_attn.q_proj_2")
    assert config["ignore"] == ["lm_head"]


@needs_library
def test_integers_for_integers(tmp_path: Path) -> None:
    spec = LinearSpec(256, 128, IntegerGrid(8, 256, symmetric=True), activation_bits=8)
    specs = dict.fromkeys(_specs(), spec)
    config, weights = _folder(tmp_path, "compressed-tensors", specs)
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True
    stored = StoredTensors(TensorReader(tmp_path), config)
    assert stored.linears == specs
    for linear, weight in weights.items():
        assert torch.equal(stored.quantized(linear).codes, weight.codes)


@pytest.mark.parametrize("name", ["awq", "awq-gemv", "awq-gemv-fast", "llm-awq"])
def test_awq_names_every_linear_that_it_cannot_hold(name: str) -> None:
    specs = _specs(
        q_proj=LinearSpec(256, 100, IntegerGrid(3, 128)),
        down_proj=LinearSpec(256, 128, IntegerGrid(4, 64)),
    )
    specs["model.layers.1.mlp.up_proj"] = LinearSpec(256, 128, IntegerGrid(8, 128), 8)
    message = str(UserError(*FORMATS[name].problems(specs)))
    assert (
        "model.layers.*.self_attn.q_proj, model.layers.*.mlp.up_proj: AWQ storage holds 4 bits"
        in (message)
    )
    assert "not 3 and 8" in message
    assert "out_features 100 is not a multiple of 8" in message
    assert "no quantized activations" in message
    assert "one group size for all linears, not 64, 128" in message


def test_gemv_kernels_have_group_sizes_of_their_own() -> None:
    specs = dict.fromkeys(_specs(), LinearSpec(256, 128, IntegerGrid(4, 64)))
    assert not list(FORMATS["awq"].problems(specs))
    assert not list(FORMATS["awq-gemv"].problems(specs))
    for name in ("awq-gemv-fast", "llm-awq"):
        (problem,) = FORMATS[name].problems(specs)
        assert "groups of 128 alone" in problem.what
        assert "model.layers.*.self_attn.q_proj, model.layers.*.mlp.down_proj" in problem.where


def test_plain_weights_do_not_stand_for_quantized_activations() -> None:
    spec = LinearSpec(256, 128, IntegerGrid(8, 256, symmetric=True), activation_bits=8)
    (problem,) = FORMATS["fake"].problems(dict.fromkeys(_specs(), spec))
    assert "without its quantized activations" in problem.what


def test_a_channel_is_group_size_minus_one_for_awq(tmp_path: Path) -> None:
    specs = _specs(
        q_proj=LinearSpec(128, 64, IntegerGrid(4, 128)),
        down_proj=LinearSpec(256, 64, IntegerGrid(4, 256)),
    )
    config, _ = _folder(tmp_path, "awq", specs)
    assert config["group_size"] == -1
    assert StoredTensors(TensorReader(tmp_path), config).linears == specs


def test_zero_points_times_scales_have_to_fit_in_float16() -> None:
    spec = LinearSpec(128, 8, IntegerGrid(4, 128))
    weight = QuantizedWeight(
        torch.zeros(128, 8, dtype=torch.uint8),
        torch.full((1, 8), 6e4).half(),
        torch.full((1, 8), 15, dtype=torch.uint8),
        spec.grid,
    )
    FORMATS["awq"].tensors("layer", weight, spec)
    with pytest.raises(UserError, match="layer: its scale times its zero point does not fit"):
        FORMATS["llm-awq"].tensors("layer", weight, spec)


@pytest.mark.parametrize("scale", [2.0**-20, 1e-6, 3e-5, 0.07, 4000.0])
def test_zero_points_survive_being_stored_times_scales(scale: float) -> None:
    spec = LinearSpec(128, 16, IntegerGrid(4, 128))
    zero = torch.arange(16, dtype=torch.uint8).unsqueeze(0)
    codes = torch.zeros(128, 16, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.full((1, 16), scale).half(), zero, spec.grid)
    stored = FORMATS["llm-awq"].tensors("layer", weight, spec)
    assert torch.equal(FORMATS["llm-awq"].read("layer", spec, stored.__getitem__).zero, zero)


@pytest.mark.parametrize(
    ("kept", "short"),
    [
        (["lm_head"], ["lm_head"]),
        (
            ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
            ["lm_head", "mlp.gate"],
        ),
        (["model.layers.0.mlp.gate_proj"], ["0.mlp.gate_proj"]),
    ],
)
def test_kept_linears_by_names_that_are_in_no_other(kept: list[str], short: list[str]) -> None:
    linear = LinearSpec(256, 128, IntegerGrid(4, 128))
    quantized = [f"model.layers.{i}.mlp.experts.{j}.gate_proj" for i in range(2) for j in range(2)]
    quantized.append("model.layers.1.mlp.gate_proj")
    if any(name.endswith("mlp.gate") for name in kept):
        quantized.pop()
    assert short_names(kept, dict.fromkeys(quantized, linear)) == short


def test_unknown_formats_are_named() -> None:
    with pytest.raises(UserError, match="no format 'gguf'\n  -> one of awq, awq-gemv"):
        find_format("gguf")
    with pytest.raises(UserError, match="quantization 'awq' 'marlin' is not read"):
        stored_format({"quant_method": "awq", "version": "marlin"})
    with pytest.raises(UserError, match="quantization 'gptq' is not read"):
        stored_format({"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize("name", READABLE)
def test_every_missing_or_misshapen_tensor_is_named(name: str, tmp_path: Path) -> None:
    config, _ = _folder(tmp_path, name, _specs())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    parts = FORMATS[name].parts("model.layers.0.self_attn.q_proj", next(iter(_specs().values())))
    scale, zeros = parts[-1 if name != "compressed-tensors" else 1], parts[1]
    if name == "compressed-tensors":
        zeros = parts[3]
    del tensors[zeros]
    other = scale.replace("layers.0", "layers.1")
    tensors[other] = tensors[other][..., :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        StoredTensors(TensorReader(tmp_path), config)
    message = str(caught.value)
    assert f"{zeros}: tensor is missing" in message
    assert f"{other}: shape" in message
    assert len(caught.value.problems) == 2


def test_a_linear_without_its_integers_is_named(tmp_path: Path) -> None:
    config, _ = _folder(tmp_path, "awq", _specs())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.qweight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"0.mlp.down_proj.qweight: tensor is missing"):
        StoredTensors(TensorReader(tmp_path), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "AWQ with 8 bits is not supported"),
        ({"group_size": "128"}, "AWQ group size '128' is not known"),
        ({"group_size": 96}, "in_features 256 is not a multiple of the group size 96"),
    ],
)
def test_awq_configs_that_are_not_understood(change: dict, message: str, tmp_path: Path) -> None:
    config, _ = _folder(tmp_path, "awq", _specs())
    with pytest.raises(UserError, match=message):
        StoredTensors(TensorReader(tmp_path), {**config, **change})


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float"}, "weights of other than 2 to 8 bit integers"),
        ({"strategy": "tensor", "group_size": None}, "strategy tensor is not supported"),
        ({"num_bits": "four"}, "the library does not understand it"),
    ],
)
def test_compressed_tensors_configs_that_are_not_understood(
    change: dict, message: str, tmp_path: Path
) -> None:
    config, _ = _folder(tmp_path, "compressed-tensors", _specs())
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(UserError, match=message):
        StoredTensors(TensorReader(tmp_path), config)


def test_zero_points_that_are_left_out_are_the_middle(tmp_path: Path) -> None:
    specs = dict.fromkeys(_specs(), LinearSpec(256, 128, IntegerGrid(4, 128, symmetric=True)))
    config, weights = _folder(tmp_path, "awq", specs)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith("qzeros")}, file)
    stored = StoredTensors(TensorReader(tmp_path), {**config, "zero_point": False})
    for linear, weight in weights.items():
        assert torch.equal(stored.quantized(linear).dequantized(), weight.dequantized())


def test_one_file_written_as_it_comes(tmp_path: Path) -> None:
    given = {
        "a.weight": torch.randn(3, 5).half(),
        "b": torch.randint(-9, 9, (2, 2), dtype=torch.int16),
        "c": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    }
    writer = SingleFileWriter(tmp_path, len(given))
    for name, tensor in given.items():
        writer.add(name, tensor)
    (path,) = writer.close()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(TensorReader(tmp_path).torch(name), tensor)
