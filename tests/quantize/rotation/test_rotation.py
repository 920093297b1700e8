"""Rotation keeps the function, and spreads what was in a few channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.recipe import RotationRecipe
from mlcawq.quantize.rotation import rotated_model

PRE_NORM = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "phi3",
    "glm",
    "granite",
    "internlm3",
    "deepseek_v2",
    "deepseek_v3",
    "minicpm3",
]
# And what their message has to speak of.
OTHERS = {
    "gemma2": "norm of what is added",
    "olmo": "needs a norm with weights",
    "olmo2": "norm of what is added",
    "stablelm": "LayerNorm is none",
    "opt": "LayerNorm is none",
    "cohere": "CohereLayerNorm is none",
    "llava": "vision tower",
}
IDS = [torch.randint(0, 390, (2, 12), generator=torch.Generator().manual_seed(1))]
LINEARS = [
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize("family", PRE_NORM)
def test_function_is_kept(family: str, tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_decoder(tmp_path / "model", family))
    rotated = rotated_model(model, RotationRecipe())
    ((expected,), (found,)) = (each.logits(IDS) for each in (model, rotated))
    assert not torch.equal(found, expected)  # of other weights
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("changes", [{"tie": True}, {"bias": True}, {"hidden": 192, "heads": 6}])
def test_heads_tied_biases_and_other_widths(changes: dict[str, int], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama", **changes)  # type: ignore[arg-type]
    model = StreamedModel(folder)
    rotated = rotated_model(model, RotationRecipe())
    ((expected,), (found,)) = (each.logits(IDS) for each in (model, rotated))
    assert (found - expected).norm() / expected.norm() < 1e-5
    if changes.get("tie"):
        assert "lm_head.weight" not in model.reader
        assert "lm_head.weight" in rotated.reader
        assert model.config.tie_word_embeddings
        assert not rotated.config.tie_word_embeddings
        assert rotated.config.raw["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", OTHERS)
def test_what_cannot_be_rotated_is_refused(family: str, tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_decoder(tmp_path / "model", family))
    with pytest.raises(UserError, match=OTHERS[family]) as caught:
        rotated_model(model, RotationRecipe())
    assert all(problem.fix for problem in caught.value.problems)
    assert len(caught.value.problems) <= 3  # not once for every block


def test_values_of_a_head_stay_among_themselves(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_model(tmp_path / "model"))
    weights = {
        heads: rotated_model(model, RotationRecipe(heads=heads)).block(0).state_dict()
        for heads in (False, True)
    }
    name, size = "self_attn.v_proj.weight", 32
    for head in range(2):
        rows = slice(head * size, (head + 1) * size)
        norms = [weights[heads][name][rows].norm(dim=0) for heads in (False, True)]
        torch.testing.assert_close(*norms)
    assert not torch.equal(weights[False][name], weights[True][name])
    untouched = "self_attn.q_proj.weight"
    assert torch.equal(weights[False][untouched], weights[True][untouched])


def test_seeds(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_model(tmp_path / "model"))
    name = "model.layers.0.mlp.down_proj.weight"
    first, again, other = (
        rotated_model(model, RotationRecipe(seed=seed)).reader.torch(name) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_are_read_as_the_whole_is(tmp_path: Path) -> None:
    model = StreamedModel(make_tiny_model(tmp_path / "model"))
    reader = rotated_model(model, RotationRecipe()).reader
    rows = torch.tensor([[3, 0], [5, 3]])
    for name in reader.names:
        tensor = reader.torch(name)
        assert tensor.shape == tuple(reader.info(name).shape)
        assert tensor.nbytes == reader.info(name).nbytes
        assert reader.numpy(name).tobytes() == tensor.numpy().tobytes()
        if tensor.ndim == 2:
            torch.testing.assert_close(reader.torch_rows(name, rows), tensor[rows])


def _outliers(folder: Path) -> StreamedModel:
    """A model with norm weights that make a few channels of the residual stream matter most."""
    model = StreamedModel(make_tiny_model(folder, hidden=256, dtype="float32"))
    read = model.reader.torch

    def torch_(name: str) -> torch.Tensor:
        tensor = read(name)
        if name.endswith("layernorm.weight"):
            tensor[[7, 90]] *= 40
        return tensor

    model.reader.torch = torch_  # type: ignore[method-assign]
    return model


def _kurtosis(weight: torch.Tensor) -> float:
    values = weight.flatten().double()
    return float(((values - values.mean()) / values.std()).pow(4).mean())


def test_weights_lose_their_outliers(tmp_path: Path) -> None:
    model = _outliers(tmp_path / "model")
    norm = model.reader.torch("model.layers.0.input_layernorm.weight")
    absorbed = model.reader.torch("model.layers.0.self_attn.q_proj.weight") * norm
    rotated = rotated_model(model, RotationRecipe()).block(0)
    weight = rotated.get_submodule("self_attn.q_proj").weight
    assert _kurtosis(absorbed) > 20
    assert _kurtosis(weight) < 4  # a normal distribution has 3
    assert torch.isclose(weight.norm(), absorbed.norm(), rtol=1e-4)


@torch.no_grad()
def test_rounding_to_nearest_is_better_after_rotation(tmp_path: Path) -> None:
    model = _outliers(tmp_path / "model")
    states = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for each in (model, rotated_model(model, RotationRecipe())):
        inputs = states
        if each is not model:  # the same hidden states, as that model has them
            rows = torch.arange(390)
            name = "model.embed_tokens.weight"
            plain, turned = (m.reader.torch_rows(name, rows).double() for m in (model, each))
            inputs = (states.double() @ torch.linalg.lstsq(plain, turned).solution).float()
        block = each.block(0)
        expected = each.run_block(block, 0, inputs)
        for name in LINEARS:
            linear = block.get_submodule(name)
            weight = linear.weight.T.contiguous()
            grid = IntegerGrid(3, 128)
            grid.round_to_nearest_(grid.grouped(weight), grid.grouped(weight))
            linear.weight.copy_(weight.T)
        found = each.run_block(block, 0, inputs)
        errors.append(float((found - expected).norm() / (expected - inputs).norm()))
    assert errors[1] < 0.7 * errors[0]
