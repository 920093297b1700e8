"""Mixtures of experts: statistics of the tokens that each expert is given."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_blocks import DecoderBlock, decoder_blocks

from mlcawq.families import ARCHITECTURES
from mlcawq.families.rows import value_head_dim
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.calls import InnerCall
from mlcawq.quantize.moments import Original, gather_moments, readers_at_once
from mlcawq.quantize.recipe import load_recipe
from mlcawq.quantize.statistics import token_weights
from mlcawq.quantize.workspace import Workspace


def _hidden(block: DecoderBlock, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, block.config.hidden_size, generator=generator) for _ in "ab"]


def _workspace(block: DecoderBlock, hidden: list[torch.Tensor], recipe: str = "awq") -> Workspace:
    return Workspace(
        block.module,
        hidden,
        block.arguments,
        ARCHITECTURES[block.model_type].groups_of(block.module),
        load_recipe(recipe, {"group_size": 32}),
        "layers.1",
        lambda linear: f"layers.1.{linear}",
    )


def _quantized(block: DecoderBlock, hidden: list[torch.Tensor], recipe: str) -> BlockResult:
    original = Original(copy.deepcopy(block.module), [states.clone() for states in hidden])
    return quantize_block(
        block.module,
        hidden,
        block.arguments,
        ARCHITECTURES[block.model_type].groups_of(block.module),
        load_recipe(recipe, {"group_size": 32}),
        name="layers.1",
        full_name=lambda linear: f"layers.1.{linear}",
        head_dim=value_head_dim(block.config),
        original=original,
    )


@torch.no_grad()
def test_experts_count_their_own_tokens_by_their_routing_weights() -> None:
    block = decoder_blocks("mixtral")[1]
    hidden = _hidden(block, 100)
    work = _workspace(block, hidden)
    assert not work.neglected

    norm, mlp = block.module.post_attention_layernorm, block.module.mlp
    tokens: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _, args, output: tokens.append(output.flatten(0, 1)))
    weights = torch.cat([token_weights(block(states), True) for states in hidden])
    inputs = torch.cat(tokens)
    _, routing, choice = mlp.gate(inputs)
    for e in range(4):
        place, rank = torch.where(choice == e)
        seen = work.seen_by(f"mlp.experts.{e}.w3")
        assert seen.seen == len(place)
        torch.testing.assert_close(seen.mean_abs, inputs[place].abs().mean(0))
        counts = weights[place] * routing[place, rank].square()
        first = inputs[place, :32]
        torch.testing.assert_close(
            seen.grams[32][0], (first * counts[:, None]).T @ first, rtol=1e-4, atol=1e-4
        )
    whole = next(group for group in work.groups if "mlp.experts.0.w1" in group.linears)
    together = work.seen_together(whole)
    assert together.seen == len(inputs)
    torch.testing.assert_close(together.mean_abs, inputs.abs().mean(0))


@torch.no_grad()
def test_experts_without_tokens_fall_back_and_are_told() -> None:
    block = decoder_blocks("deepseek_v3")[1]
    hidden = [states[:1] for states in _hidden(block, 3)]
    work = _workspace(copy.deepcopy(block), hidden)
    assert len(work.neglected) == 8  # 6 tokens, two experts each
    unseen = [expert for expert, seen in work.neglected.items() if seen == 0]
    assert unseen
    router = work.statistics["mlp.shared_experts.gate_proj"]
    torch.testing.assert_close(work.seen_by(f"{unseen[0]}.up_proj").mean_abs, router.mean_abs)
    assert work.seen_by(f"{unseen[0]}.down_proj").grams[32].any()

    result = _quantized(block, hidden, "awq+gptq")
    assert [warning.partition(":")[0] for warning in result.warnings] == list(work.neglected)
    assert all(torch.isfinite(weight.dequantized()).all() for weight in result.weights.values())
    assert result.error < 0.5


@torch.no_grad()
def test_moments_of_experts_against_the_original() -> None:
    """A block that nothing has happened to yet sees what the original sees, expert by expert."""
    block = decoder_blocks("qwen2_moe")[1]
    hidden = _hidden(block, 100)
    work = _workspace(block, hidden)
    original = Original(copy.deepcopy(block.module), hidden)
    batches = readers_at_once(work)
    assert [f"mlp.experts.{e}.gate_proj" for e in range(4)] in batches
    assert [f"mlp.experts.{e}.down_proj" for e in range(4)] in batches
    assert ["mlp.shared_expert.down_proj"] in batches
    for batch in batches:
        for reader, (moment, cross) in gather_moments(work, batch, original).items():
            assert cross is not None
            torch.testing.assert_close(cross, moment)
            gram = work.seen_by(reader).grams[32][0]
            torch.testing.assert_close(moment[:32, :32], gram, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("case", ["mixtral", "falcon rw", "bloom", "mpt"])
def test_a_result_is_the_whole_change(case: str) -> None:
    """The original block with the weights and the changed tensors of a result computes as it."""
    block, fresh = decoder_blocks(case)[1], decoder_blocks(case)[1]
    hidden = _hidden(block, 24)
    result = _quantized(block, hidden, "awq")
    assert result.error < 0.2
    assert all(linear.found < 1.02 * linear.nearest for linear in result.linears)
    state = {f"{name}.weight": weight.dequantized().T for name, weight in result.weights.items()}
    fresh.module.load_state_dict({**fresh.module.state_dict(), **state, **result.changed})
    for states, output in zip(hidden, result.outputs, strict=True):
        torch.testing.assert_close(fresh(states), output, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "module", "reader"),
    [
        ("llama", "self_attn", "q_proj"),
        ("falcon rw", "self_attention", "query_key_value"),
        ("mpt", "attn", "Wqkv"),
        ("gptj", "attn", "v_proj"),
        ("opt", "self_attn", "k_proj"),
    ],
)
def test_attentions_are_called_as_their_blocks_call_them(
    case: str, module: str, reader: str
) -> None:
    block = decoder_blocks(case)[1]
    found: dict[str, torch.Tensor] = {}
    inner = block.module.get_submodule(module)
    hooks = (
        inner.register_forward_hook(lambda _, args, output: found.update(output=output[0])),
        inner.get_submodule(reader).register_forward_hook(
            lambda _, args, output: found.update(inputs=args[0])
        ),
    )
    block(torch.randn(3, 9, block.config.hidden_size))
    for hook in hooks:
        hook.remove()
    call = InnerCall(block.module, module, f"{module}.{reader}", block.arguments)
    torch.testing.assert_close(call(found["inputs"])[0], found["output"])
