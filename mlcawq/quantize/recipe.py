"""Recipes: every choice of a quantization, as validated data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mlcawq.errors import Problem, UserError
from mlcawq.resources import templates_dir

if TYPE_CHECKING:
    from mlcawq.quantize.integer import IntegerGrid


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


class RotationRecipe(_Strict):
    """Rotation of the residual stream, folded into the weights (QuaRot, arXiv 2404.00456).

    heads: rotate the values of each head too.
    seed: of the random signs of the Hadamard matrices.
    """

    heads: bool = True
    seed: int = Field(default=0, ge=0)


class ScaleRecipe(_Strict):
    """Search of the per-channel scales (AWQ, section 3.2).

    objective: "block" compares the output of the module that the linears belong to (attention,
        MLP), "linear" the outputs of the linears themselves.
    grid: number of exponents r tried, evenly from 0.
    formula: what a scale is made of, in LLMC's names: "v1" activations^r / weights^(1-r), "v2"
        activations^r alone, "both" tries either; magnitudes of a channel's activations, and of
        its weights within their groups.
    tokens: how many calibration tokens judge the candidates.
    """

    objective: Literal["block", "linear"] = "block"
    grid: int = Field(default=20, ge=1, le=100)
    formula: Literal["v1", "v2", "both"] = "both"
    tokens: int = Field(default=512, ge=16)


class ClipRecipe(_Strict):
    """Search of the range of each group.

    mode: "symmetric" cuts at +-m, "asymmetric" narrows the range as it lies around zero: LLMC's
        clip_sym, true and false.
    grid: number of widths tried, down to 1 - max_shrink of the full range.
    rounds: passes over the two ends one by one after that, in the asymmetric mode. LLMC narrows
        both by one factor: that is 0 rounds.
    exclude: linears that keep their full range, by the end of their names.
    """

    mode: Literal["asymmetric", "symmetric"] = "asymmetric"
    grid: int = Field(default=10, ge=1, le=100)
    max_shrink: float = Field(default=0.5, gt=0, lt=1)
    rounds: int = Field(default=1, ge=0, le=10)
    exclude: tuple[str, ...] = ()


class CompensationRecipe(_Strict):
    """Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323).

    act_order: input channels of large activations are rounded first, while much can still be made
        up for; otherwise in their order. What is stored does not depend on it.
    damping: how much of the mean of the moments' diagonal is added to it.
    block_size: channels between two updates of all that follow; a matter of speed only.
    true_sequential: linears are rounded for the inputs that the rounded ones before them in the
        block give; otherwise for those of the block before any is rounded.
    towards_original: how far weights are moved first, so that the inputs that the quantized model
        gives lead to the original model's outputs (GPTAQ, arXiv 2504.02692): 1 as far as the
        calibration text asks for, which fits noise too, 0 not at all.
    """

    act_order: bool = True
    damping: float = Field(default=0.05, gt=0, le=1)
    block_size: int = Field(default=128, ge=1)
    true_sequential: bool = True
    towards_original: float = Field(default=0.5, ge=0, le=1)


class LearningRecipe(_Strict):
    """Integers moved by gradient on the error of the block's output, after they were found.

    learns: "rounding": each weight's integer, by at most one (SignRound, arXiv 2309.05516);
        "scales": of the groups, the width of their ranges therefore, with the integers as they
        are (in place of OmniQuant's learnable weight clipping, arXiv 2308.13137, which rounds
        anew within the moved range: from AWQ's clips that raised the error of the block).
    iterations: steps of descent, 0 for none. batch: calibration sequences that each one takes.
    scales_first: share of the iterations in which scales alone are learned. After compensated
        rounding, whose integers are near the best for the scales that they have, rounding learned
        at once mostly loses at first what the scales win.
    optimizer: "sign" steps by the gradient's sign, as SignRound does, "adam" as Adam does, less
        where the gradient's sign is not sure. Steps become smaller evenly, down to zero.
    rounding_rate: the first step of rounding, in integers; null takes 1 / iterations.
    scale_rate: the first step of a scale, in integers at the far end of its range.
    towards_original: how far the aim lies from what the original block makes of the inputs that
        the quantized model gives, 0, to what the original model has at its place, 1.
    hold_back: one of so many calibration sequences judges the iterates in place of teaching, so
        that what only fits the text is not taken for better; 0 lets all do both.
    compute: how the linears multiply while they learn; "auto" takes bfloat16 where that is much
        faster (CUDA, CPUs with AMX).
    seed: of the order of the sequences.
    """

    learns: tuple[Literal["rounding", "scales"], ...] = ("rounding", "scales")
    iterations: int = Field(default=200, ge=0)
    batch: int = Field(default=8, ge=1)
    scales_first: float = Field(default=0.0, ge=0, lt=1)
    optimizer: Literal["sign", "adam"] = "adam"
    rounding_rate: float | None = Field(default=None, gt=0, le=0.5)
    scale_rate: float = Field(default=0.015, gt=0, le=0.5)
    towards_original: float = Field(default=0.5, ge=0, le=1)
    hold_back: int = Field(default=8, ge=0)
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_learnable(self) -> LearningRecipe:
        if not self.learns:
            raise ValueError("learns is rounding, scales or both of them")
        if self.hold_back == 1:
            raise ValueError("hold_back 1 would leave no sequence to learn from")
        return self


class ActivationRecipe(_Strict):
    """Linears that take integers: each token is rounded, symmetrically, as the model runs.

    bits: of what a linear is given.
    """

    bits: Literal[8] = 8


class Candidate(_Strict):
    """What is tried on a block: steps as in Recipe, under a name of its own."""

    name: str
    scale: ScaleRecipe | None = ScaleRecipe()
    clip: ClipRecipe | None = ClipRecipe()
    compensation: CompensationRecipe | None = None
    learning: LearningRecipe | None = None


class ChoiceRecipe(_Strict):
    """Several recipes tried on every block, of which the one of least error is taken.

    candidates: in order of promise; they replace scale, clip, compensation and learning.
    budget_minutes: what quantizing all blocks may take: as many candidates are tried on a block as
        there is time for, at least the first that does not learn. null: all of them, so that no
        clock decides.
    hold_back: one of so many calibration sequences judges the candidates, which are fitted on the
        others.
    """

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    budget_minutes: float | None = Field(default=None, gt=0)
    hold_back: int = Field(default=8, ge=2)

    @model_validator(mode="after")
    def _are_told_apart(self) -> ChoiceRecipe:
        names = [candidate.name for candidate in self.candidates]
        if len({*names}) < len(names):
            raise ValueError("two candidates have one name")
        return self


GroupSize = Literal[32, 64, 128, "channel"]
Bits = Literal[2, 3, 4, 8]


class Override(_Strict):
    """Other integers for some linears.

    match: a regular expression that is looked for in a linear's full name.
    bits, group_size, symmetric: what is not the recipe's.
    """

    match: Annotated[str, AfterValidator(_pattern)]
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Recipe(_Strict):
    """How a checkpoint is quantized: steps in the order of the fields, null ones left out.

    Where choices differ by more than noise, the defaults are those of least mean KL divergence
    from the original, over trained models with and without outlier channels, at 3 and 4 bits.

    name: what reports call it.
    bits, group_size, symmetric: the integers. group_size "channel": one group for each output
        channel.
    overrides: other integers for some linears; of several that match, later ones win.
    rotation: of the residual stream, before anything else.
    scale, clip: AWQ's two searches.
    compensation: rounding as GPTQ does; null rounds to nearest.
    learning: integers moved by gradient, after either.
    choice: the four steps before are taken from the best of several candidates, block by block.
    activations: what linears are given is rounded too, in every search and measurement.
    token_weighting: "residual" weighs a token's error by 1 / mean(h^2) of its hidden state after
        the block, as the next norm does; "none" by 1.
    propagate: what the next block is calibrated on: the outputs of the "quantized" block, or of
        the "original" one.
    head: quantize the output head too, after the blocks, whatever is said of lm_head below; one
        that is tied to the embedding becomes a tensor of its own.
    modules_to_not_convert: regular expressions; linears in whose full name one is found stay as
        they are.
    """

    name: str = "awq"
    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    overrides: tuple[Override, ...] = ()
    rotation: RotationRecipe | None = None
    scale: ScaleRecipe | None = ScaleRecipe()
    clip: ClipRecipe | None = ClipRecipe()
    compensation: CompensationRecipe | None = None
    learning: LearningRecipe | None = None
    choice: ChoiceRecipe | None = None
    activations: ActivationRecipe | None = None
    token_weighting: Literal["residual", "none"] = "residual"
    propagate: Literal["quantized", "original"] = "quantized"
    head: bool = False
    modules_to_not_convert: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ("lm_head",)

    @model_validator(mode="after")
    def _can_choose(self) -> Recipe:
        if self.choice is not None and self.propagate == "original":
            raise ValueError("choosing block by block needs propagate: quantized")
        return self

    @property
    def follows_original(self) -> bool:
        """Whether a block is compared with what the original model does at its place."""
        if self.choice is not None:
            return True
        steps = (self.compensation, self.learning)
        return self.propagate == "quantized" and any(
            step is not None and step.towards_original > 0 for step in steps
        )

    def alternatives(self) -> list[Recipe]:
        """What is tried on a block, in order of promise: this recipe, or those it chooses from."""
        if self.choice is None:
            return [self]
        parts = ("name", "scale", "clip", "compensation", "learning")
        return [
            self.model_copy(
                update={"choice": None, **{part: getattr(candidate, part) for part in parts}}
            )
            for candidate in self.choice.candidates
        ]

    def converts(self, linear: str) -> bool:
        """Whether the linear of that full name is quantized."""
        return not any(re.search(pattern, linear) for pattern in self.modules_to_not_convert)

    def grid_of(self, linear: str, in_features: int) -> IntegerGrid:
        """The integers of the linear of that full name."""
        from mlcawq.quantize.integer import IntegerGrid  # with torch, which listing recipes spares

        bits, size, symmetric = self.bits, self.group_size, self.symmetric
        for override in self.overrides:
            if re.search(override.match, linear):
                bits = override.bits or bits
                size = override.group_size or size
                symmetric = symmetric if override.symmetric is None else override.symmetric
        return IntegerGrid(bits, in_features if size == "channel" else size, symmetric)


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in templates_dir("recipes").glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """What a recipe does, in a sentence or two: the comment that its file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, or of a file. Raises UserError where there is neither."""
    path = _find(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError.one(f"not valid YAML: {error}", str(path)) from None


def _find(name: str) -> Path:
    path = templates_dir("recipes") / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise UserError.one(
            f"no recipe {name!r}", "--recipe", f"one of {', '.join(recipe_names())}, or a YAML file"
        )
    return path


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or any YAML file by path; `overrides` replace top-level keys.

    Raises UserError listing every key that is unknown or out of range.
    """
    path = _find(name)
    try:
        content = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        raise UserError.one(f"not valid YAML: {error}", str(path)) from None
    if not isinstance(content, dict):
        raise UserError.one("a recipe is a mapping of options", str(path))
    return parse_recipe(content, str(path), overrides or {})


def extended(recipe: Recipe, lists: Mapping[str, Sequence[Any]]) -> Recipe:
    """A recipe whose lists of that name go on with these items, as plain data.

    Raises UserError listing every bad item, by its option.
    """
    content = recipe.model_dump(mode="json")
    longer = {key: [*content[key], *items] for key, items in lists.items()}
    try:
        return Recipe.model_validate({**content, **longer})
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key, place, *rest = item["loc"]
            option = {"overrides": "--override", "modules_to_not_convert": "--keep"}[str(key)]
            what = ".".join(map(str, rest))
            given = longer[str(key)][int(place)]
            shown = given["match"] if isinstance(given, Mapping) else given
            problems.append(
                Problem(f"{what}: {item['msg']}" if what else item["msg"], f"{option} {shown}")
            )
        raise UserError(*problems) from None


def parse_recipe(
    content: dict[str, Any],
    where: str = "recipe",
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """A recipe from plain data, options of the command line in place of its own.

    Raises UserError listing every bad key, by its option where it came from one.
    """
    try:
        return Recipe.model_validate({**content, **overrides})
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"])) or "recipe"
            if key in overrides:
                option = f"--{key.replace('_', '-')} {overrides[key]}"
                problems.append(Problem(item["msg"], option))
            else:
                problems.append(Problem(f"{key}: {item['msg']}", where))
        raise UserError(*problems) from None
