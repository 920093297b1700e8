"""What a quantization measured, and the model card that tells it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlcawq.quantize.recipe import Recipe


@dataclass(frozen=True)
class LinearReport:
    """Relative output error of one linear on calibration tokens. nearest: of round-to-nearest."""

    name: str
    nearest: float
    found: float


@dataclass(frozen=True)
class BlockReport:
    """error: relative error of the block's output on its calibration inputs."""

    name: str
    error: float
    linears: tuple[LinearReport, ...]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> BlockReport:
        linears = tuple(LinearReport(**linear) for linear in content["linears"])
        return cls(content["name"], content["error"], linears)


@dataclass(frozen=True)
class ModelReport:
    """The quantized model against the original, on tokens that were held out of calibration.

    kl: mean Kullback-Leibler divergence D(original || quantized), nats per token.
    agreement: share of positions where both find the same token likeliest.
    perplexity, original_perplexity: of the next token.
    seen: the text was too short to hold any out; these are calibration tokens.
    """

    tokens: int
    kl: float
    agreement: float
    perplexity: float
    original_perplexity: float
    seen: bool


@dataclass(frozen=True)
class Report:
    """Everything that is recorded of a quantization; holds no times, so that equal runs agree."""

    model: str
    model_type: str
    recipe: Recipe
    calibration: dict[str, Any]
    versions: dict[str, str]
    fingerprint: str
    blocks: tuple[BlockReport, ...]
    measured: ModelReport

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": self.recipe.model_dump(mode="json")}

    def mean_errors(self) -> list[LinearReport]:
        """By linear, root mean square over the blocks."""
        sums: dict[str, list[tuple[float, float]]] = {}
        for block in self.blocks:
            for linear in block.linears:
                sums.setdefault(linear.name, []).append((linear.nearest, linear.found))
        return [
            LinearReport(name, *(_rms([pair[side] for pair in pairs]) for side in (0, 1)))
            for name, pairs in sums.items()
        ]


def _rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def model_card(report: Report, fmt: str) -> str:
    """README.md of the output folder."""
    recipe, measured = report.recipe, report.measured
    kind = "symmetric" if recipe.symmetric else "asymmetric"
    how = _METHODS[recipe.method]
    rows = "\n".join(
        f"| {linear.name} | {linear.nearest:.2%} | {linear.found:.2%} |"
        for linear in report.mean_errors()
    )
    options = "\n".join(
        f"| {key} | `{value}` |" for key, value in recipe.model_dump(mode="json").items()
    )
    stored = _STORED[fmt].format(group=recipe.group_size)
    text = "calibration tokens (none could be held out)" if measured.seen else "held-out tokens"
    data = report.calibration
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"awq, " if fmt == "awq" else ""}{recipe.bits}-bit, mlcawq]
---
# {report.model}, {recipe.bits} bits

Weights of {report.model} ({report.model_type}), quantized by mlcawq {report.versions["mlcawq"]}: \
{how}, {kind} {recipe.bits}-bit integers, groups of {recipe.group_size}. {stored}

## Measured

Against the original model, on {measured.tokens} {text}:

| | original | quantized |
|---|---|---|
| perplexity | {measured.original_perplexity:.5g} | {measured.perplexity:.5g} |
| KL divergence, millinats per token | | {measured.kl * 1000:.3f} |
| same likeliest token | | {measured.agreement:.2%} |

Relative error of the linears' outputs on calibration tokens, root mean square over the blocks:

| linear | round to nearest | this model |
|---|---|---|
{rows}

`quantization_report.json` has them layer by layer.

## Made with

Calibration: {data["sequences"]} sequences, {data["tokens"]} tokens of {data["source"]} \
(SHA-256 of all tokens {data["digest"][:16]}…).

| recipe | |
|---|---|
{options}

## Use

{_USE[fmt]}
"""


_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "awq+gptq": "AWQ, rounded by GPTQ",
    "rtn": "round to nearest",
}
_STORED = {
    "awq": 'Stored as AutoAWQ\'s "gemm" version; all other tensors are float16.',
    "fake": "Stored dequantized, in float16: for measuring, not for saving space.",
}
_USE = {
    "awq": """```sh
mlcawq build THIS_FOLDER -o OUT --target cpu
mlcawq chat OUT
```

transformers, AutoAWQ, vLLM, SGLang and mlc_llm (`--source-format awq`) read the folder as well.""",
    "fake": """```python
transformers.AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
```""",
}
