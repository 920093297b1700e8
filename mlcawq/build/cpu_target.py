"""TVM's targets for processors: this machine's, one of a level, or one described in JSON.

A library holds its kernels for one target or for several, each a `Variant`; of several it takes
the best that the machine has when it is loaded.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlcawq.engine.cpu_library import LEVEL_VARIABLE
from mlcawq.engine.processor import Processor, this_processor
from mlcawq.errors import UserError
from tir_kernels.levels import FEATURES, Level, architecture_named, level_named, levels_of

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

# Of the Debian triples; where an architecture is not the machine's, code is made for Linux.
_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def level_target(level: Level) -> Target:
    """The target that code for `level` is generated for."""
    from mlcawq.graph._tvm import Target

    described: dict[str, Any] = {"kind": "llvm", "mcpu": level.mcpu}
    if level.mattr:
        described["mattr"] = list(level.mattr)
    if level.architecture != architecture_named(platform.machine()):
        described["mtriple"] = _TRIPLES[level.architecture]
    return Target(described)


def native_target(processor: Processor | None = None) -> Target:
    """This machine's processor, with the features that it really has.

    LLVM goes by the model, and virtual machines show models that lack what is there, or hide what
    the model promises; code that uses what is hidden would die of an illegal instruction.
    """
    from mlcawq.graph._tvm import Target, tvm

    processor = processor or this_processor()
    mcpu = tvm.target.codegen.llvm_get_system_cpu()
    target = Target({"kind": "llvm", "mcpu": mcpu})
    if processor.features is None:
        return target
    promised = frozenset(features_of(target))
    mattr = [f"+{name}" for name in sorted(processor.features - promised)]
    mattr += [f"-{name}" for name in sorted(promised - processor.features)]
    return Target({"kind": "llvm", "mcpu": mcpu, "mattr": mattr}) if mattr else target


def without_tiles(target: Target) -> Target:
    """`target` less AMX, for libraries that do not ask the system for its registers."""
    from mlcawq.graph._tvm import Target

    tiles = [f"-{name}" for name in features_of(target) if name.startswith("amx-")]
    if not tiles:
        return target
    attributes = json.loads(str(target))
    return Target({**attributes, "mattr": [*attributes.get("mattr", ()), *tiles]})


def features_of(target: Target) -> tuple[str, ...]:
    """What a machine must have for code for `target`, of the features that `FEATURES` knows."""
    from mlcawq.graph._tvm import tvm

    promised = {str(name) for name in tvm.target.codegen.llvm_get_cpu_features(target)}
    known = FEATURES.get(target_architecture(target), ())
    return tuple(feature.name for feature in known if feature.name in promised)


def target_architecture(target: Target) -> str:
    """x86_64, aarch64, or as the triple calls it."""
    triple = str(target.attrs.get("mtriple", "")) or platform.machine()
    return architecture_named(triple.split("-")[0])


@dataclass(frozen=True)
class Variant:
    """name: the level's, or "native", or "custom" for a target in JSON. features: what a machine
    must have to run it.
    """

    name: str
    target: Target
    features: tuple[str, ...]


def cpu_variants(asked: str) -> tuple[Variant, ...]:
    """What a library for "cpu" (all levels of this machine's architecture), "cpu:native" or
    "cpu:LEVEL" holds, best last.

    A level that this machine lacks is no mistake: the library may be for another one. Raises
    UserError for a level that is not known, and for one of another architecture.
    """
    architecture = architecture_named(platform.machine())
    levels = levels_of(architecture)
    _, _, name = asked.partition(":")
    if not name and levels:
        return tuple(_of_level(level) for level in levels)
    if name in ("", "native"):
        target = native_target()
        return (Variant("native", target, features_of(target)),)
    level = level_named(name)
    if level is None or level.architecture != architecture:
        known = ", ".join(["cpu", "cpu:native", *(f"cpu:{level.name}" for level in levels)])
        what = (
            f"target {asked} is not known"
            if level is None
            else f"target {asked} is for another architecture than this machine ({architecture})"
        )
        raise UserError.one(what, "--target", f"use one of {known}")
    return (_of_level(level),)


def _of_level(level: Level) -> Variant:
    return Variant(level.name, level_target(level), level.features)


def variant_of(target: Target) -> Variant:
    """The only variant of a library for a target that was made elsewhere."""
    architecture = target_architecture(target)
    for level in levels_of(architecture):
        if str(level_target(level)) == str(target):
            return _of_level(level)
    return Variant("custom", target, features_of(target))


def cpu_target(asked: str = "cpu") -> Target:
    """Of the variants that a library for `asked` holds, the one that would run here, where
    MLCAWQ_CPU_LEVEL has its say; the lowest where none would.

    Raises UserError as `cpu_variants` does.
    """
    variants = cpu_variants(asked)
    processor, forced = this_processor(), os.environ.get(LEVEL_VARIABLE)
    here = [variant for variant in variants if not processor.lacks(variant.features)]
    here = [variant for variant in here if variant.name == forced] or here
    return (here or variants)[-1 if here else 0].target


def cpu_target_from_json(given: dict[str, Any], text: str) -> Target:
    """A target of kind llvm; text: how it was written, for messages.

    Raises UserError for attributes that TVM does not know, and for another architecture.
    """
    from mlcawq.graph._tvm import Target

    try:
        resolved = Target(given)
    except Exception as error:
        raise UserError.one(
            f"TVM does not accept the target {text}: {str(error).splitlines()[0]}"
        ) from None
    machine = architecture_named(platform.machine())
    if target_architecture(resolved) != machine:
        raise UserError.one(
            f"target {text} is for another architecture than this machine ({machine})",
            fix="build on a machine of that architecture; cross-compiling is not supported",
        )
    return resolved
