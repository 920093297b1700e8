"""Data sets of the hub, through the `datasets` package where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlcawq.errors import UserError


@dataclass(frozen=True)
class HubData:
    """Where a data set lies: its repository, its configuration there (None for the only one)."""

    repository: str
    config: str | None
    split: str


def hub_rows(name: str, data: HubData, *, option: str, instead: str) -> Any:
    """The rows of a data set, mappings by column; read from the local cache where it is there.

    option: what the user named it with. instead: what to do without it, as an instruction.
    Raises UserError where the package is missing or the hub cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError.one(
            f"{name} is read through the `datasets` package, which is not installed",
            option,
            f"pip install 'mlcawq[hub-data]', or {instead}",
        ) from None
    try:
        return load_dataset(data.repository, data.config, split=data.split)
    except Exception as error:  # network, hub and cache errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError.one(
            f"could not be loaded from the hub ({reason})",
            data.repository,
            f"check the network, or {instead}",
        ) from None
