"""What is recorded of a quantization: quantization_report.json, and the same as data.

Everything that equal runs agree on stands in the report itself; times and memory, which differ
from run to run, stand apart under "run". Fields that a version of mlcawq does not know are
passed over, and fields that an older one did not write have defaults, so that reports of all
versions can be read and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from mlcawq.errors import UserError
from mlcawq.quantize.patterns import kind_of

REPORT_FILE = "quantization_report.json"
REPORT_PAGE = "quantization_report.html"


@dataclass(frozen=True)
class Spread:
    """How many positive numbers are distributed: extremes, 5th and 95th percentile, mean."""

    minimum: float
    low: float
    median: float
    high: float
    maximum: float
    mean: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Spread:
        """Of a tensor of any shape, without copies to the host but of the six numbers."""
        flat = values.detach().flatten().float().sort().values
        last = flat.numel() - 1
        ranks = [0, round(0.05 * last), last // 2, round(0.95 * last), last]
        minimum, low, median, high, maximum = flat[ranks].tolist()
        return cls(minimum, low, median, high, maximum, mean=float(flat.mean()))


@dataclass(frozen=True)
class LinearReport:
    """What became of one quantized linear.

    name: in its block ("mlp.experts.3.up_proj").
    nearest, found: relative error of its output on calibration tokens, rounded to nearest, and as
        stored.
    bits, group_size, symmetric: its integers.
    weights: how many it has, K * N. stored_bytes: what they take in the output, scales and zero
        points included.
    scale: the factors of its input channels; None where none was applied.
    clip: width of its groups' ranges as stored, as a share of the full range; None where the
        full range was kept everywhere.
    tokens: calibration tokens that it was given, fewer than all of them for an expert.
    """

    name: str
    nearest: float
    found: float
    bits: int | None = None
    group_size: int | Literal["channel"] | None = None
    symmetric: bool | None = None
    weights: int | None = None
    stored_bytes: int | None = None
    scale: Spread | None = None
    clip: Spread | None = None
    tokens: int | None = None

    @property
    def kind(self) -> str:
        """The name with "*" for an expert's number: what the linears of all layers share."""
        return kind_of(self.name)


@dataclass(frozen=True)
class BlockReport:
    """What became of one decoder block, or of the head: a block of one linear, of its own name.

    error: relative error of the block's output on its calibration inputs.
    chosen: the recipe that was taken for this block, where one was chosen block by block.
    warnings: whatever did not go as it usually does, each naming the linear.
    """

    name: str
    error: float
    linears: tuple[LinearReport, ...]
    chosen: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_head(self) -> bool:
        return [linear.name for linear in self.linears] == [self.name]

    def full_name(self, linear: LinearReport) -> str:
        """Of one of its linears, in the checkpoint."""
        return linear.name if self.is_head else f"{self.name}.{linear.name}"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BlockReport:
        """Raises pydantic.ValidationError for anything that is not a block's report."""
        return _BLOCK.validate_python(dict(content))


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
class Storage:
    """Bytes of all tensors: of the original checkpoint, and of the output."""

    original: int
    output: int


@dataclass(frozen=True)
class Usage:
    """Time and memory. peak_memory: most bytes that the process held; 0 where it is not known."""

    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Run:
    """How a quantization went on the machine that did it; equal runs differ in it.

    total: of all blocks and of what came after them, interrupted runs included.
    blocks: of every block, in order.
    """

    device: str
    total: Usage
    blocks: tuple[Usage, ...]


@dataclass(frozen=True)
class Report:
    """Everything that is recorded of a quantization.

    recipe: its options as plain data. format: of the output. calibration: source, sequences,
    tokens, and the digest of all tokens. fingerprint: of everything the output depends on.
    """

    model: str
    model_type: str
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    fingerprint: str
    blocks: tuple[BlockReport, ...]
    measured: ModelReport
    format: str = "awq"
    storage: Storage | None = None
    warnings: tuple[str, ...] = ()
    run: Run | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """Raises pydantic.ValidationError for anything that is not a report."""
        return _REPORT.validate_python(dict(content))

    @property
    def linears(self) -> list[tuple[str, LinearReport]]:
        """Every quantized linear with its full name."""
        return [
            (block.full_name(linear), linear) for block in self.blocks for linear in block.linears
        ]

    def mean_errors(self) -> list[LinearReport]:
        """By kind of linear, root mean square over the blocks and their experts."""
        kinds: dict[str, list[LinearReport]] = {}
        for _, linear in self.linears:
            kinds.setdefault(linear.kind, []).append(linear)
        return [mean_error(kind, linears) for kind, linears in kinds.items()]

    def bits_per_weight(self) -> float | None:
        """Of the quantized linears as stored; None where their sizes were not recorded."""
        sizes = [(linear.stored_bytes, linear.weights) for _, linear in self.linears]
        stored = sum(size for size, _ in sizes if size is not None)
        weights = sum(count for _, count in sizes if count is not None)
        return 8 * stored / weights if stored and weights else None

    def all_warnings(self) -> list[str]:
        """Those of the whole model, then those of the blocks under their names."""
        found = list(self.warnings)
        for block in self.blocks:
            found += [f"{block.name}: {warning}" for warning in block.warnings]
        return found


_BLOCK = TypeAdapter(BlockReport)
_REPORT = TypeAdapter(Report)


def mean_error(name: str, linears: Iterable[LinearReport]) -> LinearReport:
    """The root mean square errors of several linears, under one name."""
    pairs = [(linear.nearest, linear.found) for linear in linears]
    nearest, found = (_rms([pair[side] for pair in pairs]) for side in (0, 1))
    return LinearReport(name, nearest, found)


def _rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def read_report(path: Path) -> Report:
    """The report of a quantized folder, or a report file itself.

    Raises UserError where there is none, or where it is something else.
    """
    path = Path(path)
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"no {REPORT_FILE} in it" if path.is_dir() else "no such file or folder"
        fix = "give a folder that `mlcawq quantize` wrote, or the report of one"
        raise UserError.one(what, str(path), fix)
    try:
        return Report.from_json(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", str(file)) from None
    except ValidationError as error:
        places = ", ".join(".".join(map(str, item["loc"])) for item in error.errors()[:3])
        raise UserError.one(f"not a report of mlcawq quantize (see {places})", str(file)) from None
    except (ValueError, TypeError, RecursionError):
        raise UserError.one("not a report of mlcawq quantize", str(file)) from None
