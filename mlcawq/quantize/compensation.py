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


class Compensator:
    """What rounding linears that read one tensor takes: the factorized moments of their inputs.

    moment: [K, K], sum over tokens of x x^T, of the inputs that the linears will be given.

    Raises NotFiniteError for moments that are not finite.
    """

    def __init__(self, moment: torch.Tensor, recipe: CompensationRecipe) -> None:
        self._recipe = recipe
        self._order = torch.arange(len(moment), device=moment.device)
        if recipe.act_order:
            self._order = moment.diagonal().argsort(descending=True, stable=True)
        self._factor = inverse_factor(moment, recipe.damping, self._order)

    def aimed(self, weight: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """`weight` [K, N], moved towards the least |X W - X' W'|^2 by the share that the recipe
        says.

        missing: [K, K], sum over tokens of x' (x - x')^T, with the inputs x' that the quantized
        model gives and x of the original one.
        """
        wanted = (missing @ weight)[self._order]
        moved = torch.empty_like(weight)
        moved[self._order] = self._factor.T @ (self._factor @ wanted)
        return moved.mul_(self._recipe.towards_original).add_(weight)

    def rounded(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grid: IntegerGrid,
        position: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Integers of small error |X (W - W')|^2.

        weight: float32 [K, N]. scale and zero: [K/G, 1, N]; with them alone each weight would be
        rounded to nearest. Channels whose input is always zero are rounded to nearest. position:
        [K, N], is given what the integers were rounded from in the end, zero point included.

        Raises NotFiniteError where weights overflow.
        """
        order, factor = self._order, self._factor
        group = order // grid.group_size
        rest = weight[order]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for start in range(0, len(weight), self._recipe.block_size):
            block = slice(start, min(start + self._recipe.block_size, len(weight)))
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
        return QuantizedWeight(
            codes, scale.squeeze(1).to(torch.float16), zero.squeeze(1).byte(), grid
        )


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
    inverse = torch.eye(len(lower), device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)
