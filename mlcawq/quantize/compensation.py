"""Rounding that makes up for its own errors: GPTQ (arXiv 2210.17323) on given scales and zeros.

Input channels are rounded one after another, and the error of each is taken out of those that are
still to come, in the measure in which their inputs go together. Scales and zero points stay what
they are ("static groups"), so that the result is stored like any other and costs nothing at run
time, in whatever order the channels are taken.

Before that, weights can be moved to make up for what was rounded before them as well: GPTAQ (arXiv
2504.02692) asks for the original model's output from the inputs that the quantized one gives.
"""

from __future__ import annotations

import math

import torch

from mlcawq.quantize.guards import NotFiniteError
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight
from mlcawq.quantize.recipe import CompensationRecipe


def round_compensated(
    weight: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: IntegerGrid,
    recipe: CompensationRecipe,
    position: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Integers of small error |X (W - W')|^2.

    weight: float32 [K, N]. moment: [K, K], sum over tokens of x x^T, of the inputs that the linear
    will be given. scale and zero: [K/G, 1, N]; with them alone each weight would be rounded to
    nearest. Channels whose input is always zero are rounded to nearest. position: [K, N], is given
    what the integers were rounded from in the end, zero point included.
    """
    K, N = weight.shape
    order = torch.arange(K, device=weight.device)
    if recipe.act_order:
        order = moment.diagonal().argsort(descending=True, stable=True)
    group = order // grid.group_size
    factor = inverse_factor(moment, recipe.damping, order)
    rest = weight[order]
    codes = torch.empty(K, N, dtype=torch.uint8, device=weight.device)
    for start in range(0, K, recipe.block_size):
        block = slice(start, min(start + recipe.block_size, K))
        local, errors = factor[block, block], torch.empty_like(rest[block])
        current = rest[block]
        for i in range(current.shape[0]):
            s, z = scale[group[start + i], 0], zero[group[start + i], 0]
            code = torch.empty_like(s)
            grid.codes_(current[i], s, z, out=code)
            codes[order[start + i]] = code.to(torch.uint8)
            if position is not None:
                position[order[start + i]] = torch.addcmul(z, current[i], s.reciprocal())
            errors[i] = (current[i] - (code - z) * s) / local[i, i]
            current[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        rest[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    if not torch.isfinite(rest).all():
        raise NotFiniteError.one("making up for rounding gave NaN or infinite weights")
    return QuantizedWeight(codes, scale.squeeze(1).to(torch.float16), zero.squeeze(1).byte(), grid)


def aimed_at_original(
    weight: torch.Tensor,
    moment: torch.Tensor,
    cross: torch.Tensor,
    recipe: CompensationRecipe,
) -> torch.Tensor:
    """`weight` [K, N], moved towards the least |X W - X' W'|^2 by the share that the recipe says.

    moment: [K, K], sum of x' x'^T over the inputs x' of the quantized model. cross: [K, K], sum of
    x' x^T, with the inputs x of the original one.
    """
    factor = inverse_factor(moment, recipe.damping)
    missing = (cross - moment) @ weight
    return weight + recipe.towards_original * (factor.T @ (factor @ missing))


def inverse_factor(
    moment: torch.Tensor, damping: float, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The upper triangular R with R^T R = (moment + d I)^-1, float32 [K, K].

    d is `damping` times the mean of the diagonal, more where rounding has left the sum of fewer
    tokens than channels without a factorization. Channels that are always zero stay by themselves.
    order: int64 [K], of the channels; their own when None.
    """
    # Of the matrix read backwards, L L^T is R^-1 R^-T read backwards: no inverse is needed.
    if order is None:
        backwards = moment.flip(0, 1)
    else:
        reverse = order.flip(0)
        backwards = moment[reverse.unsqueeze(1), reverse]
    diagonal = backwards.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    while True:
        if not math.isfinite(damping * mean):
            raise NotFiniteError.one("the moments of the inputs are not finite")
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed:
            break
        damping *= 2
    del backwards, diagonal  # each of these matrices can be gigabytes
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
