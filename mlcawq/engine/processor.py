"""What this machine's processor can do: its architecture, features, and best level."""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

from tir_kernels.levels import Level, architecture_named, features_in, levels_of

CPUINFO = Path("/proc/cpuinfo")
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Linux 5.16
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Processor:
    """features: LLVM's names, of those in `tir_kernels.levels.FEATURES`; None where the system
    does not tell.
    """

    architecture: str
    features: frozenset[str] | None

    def lacks(self, features: tuple[str, ...]) -> list[str]:
        """Which of `features` are not here, as far as is known."""
        if self.features is None:
            return []
        return [name for name in features if name not in self.features]

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of its architecture that it has, best last."""
        return tuple(
            level for level in levels_of(self.architecture) if not self.lacks(level.features)
        )


def this_processor() -> Processor:
    """The machine's. Features that the system does not let this process use are not among them."""
    architecture = architecture_named(platform.machine())
    flags = _flags(CPUINFO)
    if flags is None:
        return Processor(architecture, None)
    features = features_in(flags, architecture)
    if "amx-tile" in features and not _may_use_tiles():
        features = frozenset(name for name in features if not name.startswith("amx-"))
    return Processor(architecture, features)


def _flags(cpuinfo: Path) -> set[str] | None:
    """The words that Linux lists for the first processor; None where it lists none."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return None


@functools.cache
def _may_use_tiles() -> bool:
    """Asks Linux for AMX's registers, which a process gets for good or not at all."""
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0
    except (OSError, AttributeError):
        return False
