"""Where blocks are computed, and in which type."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.quantize.distributed import local_rank


@dataclass(frozen=True)
class Place:
    """device: where blocks are run and searched. dtype: of the products of a block that runs."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def settle(self, block: nn.Module) -> nn.Module:
        """Move a block here; what it is called with goes on in float32, its products in `dtype`."""
        block = block.to(self.device)
        if self.dtype != torch.float32:
            # Parts of it that are called by themselves, which a search compares, stay exact.
            module: Any = block
            module.forward = torch.autocast(self.device.type, self.dtype)(module.forward)
        return block

    def moved(self, value: Any) -> Any:
        """Tensors within dictionaries, lists and tuples, here."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {key: self.moved(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.moved(item) for item in value)
        return value


def run_exactly(block: nn.Module, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """A settled block in float32: hidden states [B, T, hidden_size] to the same."""
    output = type(block).forward(block, states, **arguments)
    return output[0] if isinstance(output, tuple) else output


def find_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:i; of several processes on a machine each gets a GPU of its own.

    Raises UserError for a name that is none of these, and for a GPU that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    found = re.fullmatch(r"(?:auto|cuda(?::(\d+))?)", name)
    if found is None:
        raise UserError.one(f"no device {name!r}", "--device", "auto, cpu, cuda or cuda:1")
    if not count:
        raise UserError.one("torch finds no GPU", f"--device {name}", "use --device cpu")
    index = int(found[1]) if found[1] else local_rank() % count
    if index >= count:
        raise UserError.one(
            f"torch finds {count} GPUs, counted from 0", f"--device {name}", "choose one of them"
        )
    return torch.device("cuda", index)


def find_dtype(name: str) -> torch.dtype:
    """auto, float32 or bfloat16. Raises UserError for other names."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError.one(f"no type {name!r}", "--dtype", "auto, float32 or bfloat16")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def give_back_memory() -> None:
    """Let the system have what the allocators keep of freed memory: blocks then take alike."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    """glibc's; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
