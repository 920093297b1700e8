"""The two kinds of model folder that are evaluated, and what a table calls each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlcawq.checkpoint.config import load_json
from mlcawq.errors import Problem

Kind = Literal["checkpoint", "built"]

CHAT_CONFIG = "mlc-chat-config.json"


def folder_kind(folder: Path) -> Kind | Problem:
    """What a model folder is, by the files in it alone; a Problem when it is neither kind."""
    where = str(folder)
    if not folder.is_dir():
        fix = "give a folder: a Hugging Face checkpoint, or one that `mlcawq build` wrote"
        return Problem("no such folder", where, fix)
    if (folder / CHAT_CONFIG).is_file():
        return "built"
    if (folder / "config.json").is_file():
        return "checkpoint"
    return Problem(
        f"neither {CHAT_CONFIG} nor config.json is in it",
        where,
        "give a Hugging Face checkpoint, or a folder that `mlcawq build` wrote",
    )


def folder_label(folder: Path, kind: Kind) -> str:
    """What a table calls the model: q4f16_autoawq, awq w4 g128, or the type of its weights."""
    if kind == "built":
        return str(load_json(folder / CHAT_CONFIG).get("quantization", "built"))
    from mlcawq.checkpoint.decoder_config import read_decoder_config
    from mlcawq.quantize.formats import stored_format

    config = read_decoder_config(folder)
    given = config.quantization
    return config.dtype if given is None else stored_format(given).label(given)
