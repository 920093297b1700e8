"""What a library's kernels round further than its type of activations does, to be faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlcawq.errors import Problem, raise_all
from tir_kernels.layouts import BLOCKED

# Bits of the integers that the CPU's kernels for their own layout make of activations. Those of
# the first are in the measure of float16.
ACTIVATIONS = {"int16": 16, "int8": 8}
# How keys and values are kept: as activations are, or as `tir_kernels.cpu.slots` has it.
KV_CACHE_DTYPES = ("auto", "int8")


@dataclass(frozen=True)
class Roundings:
    """activations: one of ACTIVATIONS, which only kernels for the layout n16k8 heed, and of them
    not those of the output head. kv_cache_dtype: one of KV_CACHE_DTYPES, others than the first for
    CPUs only.
    """

    activations: str = "int16"
    kv_cache_dtype: str = "auto"

    @property
    def act_bits(self) -> int:
        return ACTIVATIONS[self.activations]

    @property
    def stored(self) -> str | None:
        """As of `tir_kernels.cpu.slots.Slots`."""
        return None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def names(self) -> dict[str, str]:
        """As files have it, which say nothing where there is no such rounding."""
        mine, none = vars(self), vars(EXACT)
        return {name: value for name, value in mine.items() if value != none[name]}

    @classmethod
    def named(cls, raw: Mapping[str, Any], where: str, problems: list[Problem]) -> Roundings:
        """What a file says; what is not known in it is added to `problems`."""
        found = {name: raw.get(name, value) for name, value in vars(EXACT).items()}
        for name, known in _KNOWN.items():
            if not isinstance(found[name], str) or found[name] not in known:
                what = f"{name} = {found[name]!r} is not known"
                problems.append(Problem(what, where, f"it can be {' or '.join(known)}"))
                found[name] = getattr(EXACT, name)
        return cls(**found)

    def changed(self, activations: str | None, kv_cache_dtype: str | None) -> Roundings:
        """These, with what is named in their place."""
        return Roundings(activations or self.activations, kv_cache_dtype or self.kv_cache_dtype)


EXACT = Roundings()
_KNOWN = {"activations": tuple(ACTIVATIONS), "kv_cache_dtype": KV_CACHE_DTYPES}


def check_roundings(roundings: Roundings, layout: str | None, device: str | None) -> None:
    """Raises UserError for what is not known, what weights in `layout` are not multiplied by, and
    what the kernels of `device`, where that is known, do not do.
    """
    problems = []
    for name, known in _KNOWN.items():
        if (value := getattr(roundings, name)) not in known:
            problems.append(
                Problem(
                    f"{name} = {value!r} is not known",
                    f"--{name.replace('_', '-')}",
                    f"use {' or '.join(known)}",
                )
            )
    if not problems and roundings.activations != EXACT.activations and layout != BLOCKED:
        problems.append(
            Problem(
                f"activations are rounded to {roundings.activations} for 4-bit weights in the "
                f"layout {BLOCKED} only, and these are {layout or 'not quantized'}",
                "--activations",
                f"leave it out, or give an AWQ checkpoint --weight-layout {BLOCKED}, which is what "
                "--target cpu takes by itself",
            )
        )
    if not problems and roundings.stored is not None and device not in (None, "cpu"):
        problems.append(
            Problem(
                f"keys and values are kept in {roundings.kv_cache_dtype} on CPUs only",
                "--kv-cache-dtype",
                f"leave it out for {device}; a folder that has it takes `gen-config "
                "--kv-cache-dtype auto`",
            )
        )
    raise_all(problems)
