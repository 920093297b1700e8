"""What a result depends on: by it unfinished and finished work is known again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import mlcawq
from mlcawq.checkpoint.source import SIDE_FILES
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import UserError
from mlcawq.quantize.calibration import CalibrationData
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import REPORT_FILE, Report


def versions() -> dict[str, str]:
    """Of the software that a result depends on."""
    return {
        "mlcawq": mlcawq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fingerprint_of(
    model: StreamedModel, recipe: Recipe, calibration: CalibrationData, fmt: str
) -> dict[str, Any]:
    """What the output's bytes depend on, by topic."""
    reader = model.reader
    headers = [
        [name, info.dtype, list(info.shape), info.file.name, info.offset]
        for name in reader.names
        for info in [reader.info(name)]
    ]
    files = sorted({reader.info(name).file for name in reader.names})
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    beside = [model.folder / name for name in SIDE_FILES]
    copied = [
        [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in beside
        if file.is_file()
    ]
    return {
        "model": digest([model.config.raw, headers, stamps]),
        "tokenizer or generation config": digest(copied),
        "recipe": {"format": fmt, **recipe.model_dump(mode="json")},
        "calibration text": calibration.digest,
        "software version": versions(),
    }


def digest(content: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def already_done(out: Path, fingerprint: dict[str, Any]) -> Report | None:
    """The report of an `out` that this very work has already written, else None.

    A run killed between placing the output and removing its journal has nothing left to do.
    """
    try:
        content = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        if content["fingerprint"] != digest(fingerprint):
            return None
        TensorReader(out)  # the weights are still there
        return Report.from_json(content)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
