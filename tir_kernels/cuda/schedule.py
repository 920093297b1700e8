"""What schedules of the CUDA kernels are chosen by: the machine, and what was measured on it.

schedules.json beside this file, where there is one, has {"sm_90": {kernel: {problem: {field:
value}}}}; the modules with the rules for kernels say what their problems and fields are.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_kernels._tvm import Target

MEASURED = Path(__file__).with_name("schedules.json")


@dataclass(frozen=True)
class Machine:
    """What schedules depend on: the usual GPU of an architecture, not the one at hand.

    multiprocessors; threads and blocks that one holds; shared_block, shared_total: bytes of shared
    memory that a block and all blocks of a multiprocessor may have; bandwidth: bytes a second.
    """

    multiprocessors: int
    threads: int
    blocks: int
    shared_block: int
    shared_total: int
    bandwidth: float


_MACHINES = {
    75: Machine(40, 1024, 16, 64 << 10, 64 << 10, 0.32e12),  # T4
    80: Machine(108, 2048, 32, 163 << 10, 164 << 10, 2.0e12),  # A100
    86: Machine(82, 1536, 16, 99 << 10, 100 << 10, 0.94e12),  # RTX 3090
    89: Machine(128, 1536, 24, 99 << 10, 100 << 10, 1.0e12),  # RTX 4090
    90: Machine(132, 2048, 32, 227 << 10, 228 << 10, 4.8e12),  # H200
}


def compute_capability(target: Target) -> int:
    """90 for arch sm_90 or sm_90a. Raises ValueError before sm_75."""
    arch = str(target.attrs["arch"])
    capability = int("".join(filter(str.isdigit, arch)))
    if capability < min(_MACHINES):
        raise ValueError(f"{arch} is not supported: kernels are for sm_{min(_MACHINES)} and later")
    return capability


def capability_for(target: Target, act_dtype: str) -> int:
    """The compute capability. Raises ValueError where it does not have such activations."""
    capability = compute_capability(target)
    if act_dtype == "bfloat16" and capability < 80:
        raise ValueError(f"sm_{capability} has no bfloat16: use float16, or sm_80 or later")
    return capability


def machine_of(capability: int) -> Machine:
    """The machine of an architecture, or of the last one before it that is known."""
    return _MACHINES[max(known for known in _MACHINES if known <= capability)]


def measured_schedules(capability: int, kernel: str) -> dict[str, dict[str, Any]]:
    """What schedules.json has for an architecture and a kernel ("few_rows"): fields by problem."""
    return _measured().get(f"sm_{capability}", {}).get(kernel, {})


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
