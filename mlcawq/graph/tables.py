"""How the two tables of the vocabulary, the output head and the embedding, are stored.

At 4 bits a weight elsewhere, a float16 head is half of what a 1B model reads for a token. The CPU's
kernels compute with heads of 8 and of 4 bits. Where the two tables are one array, the embedding
takes its rows from the packed head. Where they are two, only rows are read of the embedding, and 8
bits are for the memory that it takes: 4 would save little more and cost accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.errors import UserError
from tir_kernels.int8_weights import GROUP_SIZES as INT8_GROUPS
from tir_kernels.int8_weights import Int8Shape
from tir_kernels.layouts import BLOCKED, BlockedShape

HEADS = ("float16", "int8", "int4")
KEYS = ("head", "embedding")  # of mlc-chat-config.json and of a library's metadata
_INT4_GROUP = 32  # the finest: a head's rounding errors go straight into the logits


@dataclass(frozen=True)
class Table:
    """bits: 8 (`tir_kernels.int8_weights`, symmetric) or 4 (`tir_kernels.layouts`, the blocked
    layout); group_size: inputs that share a scale.
    """

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """As in files: "int8_g128"."""
        return f"int{self.bits}_g{self.group_size}"

    @classmethod
    def named(cls, name: object) -> Table:
        """Raises ValueError for what is no such name."""
        match = re.fullmatch(r"int([48])_g(32|64|128)", name if isinstance(name, str) else "")
        if match is None:
            raise ValueError(f"{name!r} is no way to store a table (for one: int8_g128)")
        return cls(int(match[1]), int(match[2]))

    def parameters(self, rows: int, width: int, scale_dtype: str) -> dict[str, Any]:
        """Shape and dtype of the arrays of a table [rows, width], by their names.

        Raises ValueError where the layout cannot hold it.
        """
        if self.bits == 8:
            return dict(Int8Shape(width, rows, self.group_size).parameters(scale_dtype))
        shape = BlockedShape(width, rows, self.group_size)
        return dict(shape.parameters(BLOCKED, scale_dtype))


@dataclass(frozen=True)
class Tables:
    """None: not quantized, in the type of the activations. Tied tables are stored alike."""

    head: Table | None = None
    embedding: Table | None = None

    def names(self) -> dict[str, str]:
        """What files say of them, by KEYS; nothing of a table that is not quantized."""
        tables = {"head": self.head, "embedding": self.embedding}
        return {key: table.name for key, table in tables.items() if table is not None}

    @classmethod
    def named(cls, names: Mapping[str, Any]) -> Tables:
        """The inverse of `names`; other keys are ignored. Raises ValueError as `Table.named`."""
        found = {key: Table.named(names[key]) for key in KEYS if names.get(key) is not None}
        return cls(**found)


PLAIN = Tables()


def choose_tables(
    config: ModelConfig, asked: str | None, *, packed: bool, own: bool, device: str | None
) -> Tables:
    """What --head stands for.

    asked: one of HEADS, or None for the default: int8 where the other weights lie as the CPU's
    kernels want them too (packed), else float16. own: whether the checkpoint's head is quantized
    already; it is used as it is. device: what is built for, None where that is not known.
    Raises UserError for what the model, the checkpoint or the device does not allow.
    """
    if asked is not None and asked not in HEADS:
        raise UserError.one(f"head {asked!r} is not known", "--head", f"use {', '.join(HEADS)}")
    int8 = _int8(config.hidden_size)
    awq = config.quantization
    if own and awq is not None:  # without a config of it, the plan of the weights refuses it
        if asked not in (None, "int4"):
            raise UserError.one(
                f"the checkpoint's output head is quantized to 4 bits, and {asked} was asked for",
                "--head",
                "leave it out, or quantize the model again without --quantize-head",
            )
        tables = Tables(Table(4, awq.group_size), int8)
    else:
        tables = _rounded(config, asked or ("int8" if packed and int8 else "float16"), int8)
    check_tables(tables, device)
    return tables


def check_tables(tables: Tables, device: str | None) -> None:
    """Raises UserError where a device has no kernels for quantized tables."""
    if tables != PLAIN and device not in (None, "cpu"):
        raise UserError.one(
            f"the output head is quantized ({', '.join(tables.names().values())}), and kernels for "
            f"{device} compute with a plain one",
            "--head",
            "build with --head float16, or with --target cpu; a head that `mlcawq quantize` has "
            "rounded needs quantizing again, without --quantize-head",
        )


def _rounded(config: ModelConfig, head: str, int8: Table | None) -> Tables:
    if head == "float16":
        return PLAIN
    if int8 is None:
        raise UserError.one(
            f"a hidden size of {config.hidden_size} is no multiple of {min(INT8_GROUPS)}, the "
            "smallest group that shares a scale",
            "--head",
            "use --head float16",
        )
    table = int8 if head == "int8" else Table(4, _INT4_GROUP)
    return Tables(table, table if config.tie_word_embeddings else int8)


def _int8(width: int) -> Table | None:
    return next((Table(8, size) for size in INT8_GROUPS if width % size == 0), None)
