"""Libraries for the CPU before they are loaded: which of their variants this machine can run.

Code for a processor that is not here would die of an illegal instruction; so the machine is
compared with what a library records of itself (see `mlcawq.build.cpu_dispatch`), and what does not
fit is an error that says what lacks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mlcawq.engine.library_file import machine_of, section_of
from mlcawq.engine.processor import Processor, this_processor
from mlcawq.errors import UserError

RECORD_SECTION = ".mlcawq.cpu"
LEVEL_VARIABLE = "MLCAWQ_CPU_LEVEL"
LEVEL_FUNCTION = "cpu_level"


@dataclass(frozen=True)
class Variant:
    """name: a level's, or "native", or "custom". features: what a machine must have to run it."""

    name: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """What a library says of itself. variants: best last."""

    architecture: str
    variants: tuple[Variant, ...]

    @property
    def names(self) -> str:
        return ", ".join(variant.name for variant in self.variants)


def read_record(library: Path) -> Record | None:
    """None for a library without one: mlc_llm's, and those for other devices."""
    content = section_of(library, RECORD_SECTION)
    if content is None:
        return None
    try:
        record = json.loads(content.rstrip(b"\0"))
        variants = tuple(Variant(v["name"], tuple(v["features"])) for v in record["variants"])
        return Record(record["architecture"], variants)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError.one(
            f"its section {RECORD_SECTION} is damaged ({error!r})",
            str(library),
            "compile it again with `mlcawq compile`",
        ) from None


def check_architecture(library: Path, processor: Processor | None = None) -> None:
    """Raises UserError for a library with code for another architecture than this machine's."""
    processor = processor or this_processor()
    machine = machine_of(library)
    if machine is not None and machine != processor.architecture:
        raise UserError.one(
            f"the library is for {machine}, and this machine is {processor.architecture}",
            str(library),
            f"run `mlcawq compile {library.parent} --target cpu` on this machine",
        )


def check_processor(library: Path, processor: Processor | None = None) -> Variant | None:
    """The variant that `library` will choose when it is loaded; None where it does not tell.

    Raises UserError when it is for another architecture, when this processor has none of the
    variants, and when MLCAWQ_CPU_LEVEL names one that is not there.
    """
    processor = processor or this_processor()
    check_architecture(library, processor)
    record = read_record(library)
    if record is None:
        return None
    forced = os.environ.get(LEVEL_VARIABLE)
    if forced:
        return _forced(record, forced, library, processor)
    for variant in reversed(record.variants):
        if not processor.lacks(variant.features):
            return variant
    raise UserError.one(
        f"this processor cannot run the library, which is for {record.names}: "
        f"it lacks {', '.join(processor.lacks(record.variants[0].features))}",
        str(library),
        _recompile(library, processor),
    )


def _forced(record: Record, name: str, library: Path, processor: Processor) -> Variant:
    where = f"{LEVEL_VARIABLE}={name}"
    variant = next((variant for variant in record.variants if variant.name == name), None)
    if variant is None:
        raise UserError.one(
            f"{library} has no variant of that name (it has: {record.names})",
            where,
            "name one of these, or unset the variable",
        )
    lacking = processor.lacks(variant.features)
    if lacking:
        raise UserError.one(
            f"this processor lacks {', '.join(lacking)}",
            where,
            "name a lower level, or unset the variable",
        )
    return variant


def _recompile(library: Path, processor: Processor) -> str:
    if processor.levels:
        return f"run `mlcawq compile {library.parent} --target cpu` for one that runs here too"
    return f"run `mlcawq compile {library.parent} --target cpu:native` on this machine"
