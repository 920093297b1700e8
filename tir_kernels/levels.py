"""Levels of processors' instruction sets, and how a machine tells what it has. Data, without TVM.

A library for the CPU holds its kernels once for each level of an architecture and takes the best
one that the machine has. Features have LLVM's names. The x86 levels begin with those of the psABI
(x86-64 psABI 1.0, 3.1.1); the rest are steps in what integer products a processor has.
"""

from __future__ import annotations

from dataclasses import dataclass

# XCR0: register files that the operating system saves. Without that their instructions trap.
_YMM, _ZMM, _TILES = 0x6, 0xE6, 0x60000
_EAX, _EBX, _ECX, _EDX = range(4)


@dataclass(frozen=True)
class Cpuid:
    """A bit of what the instruction CPUID gives; register: 0 to 3 for EAX, EBX, ECX, EDX.

    state: bits of XCR0 that have to be set as well.
    """

    leaf: int
    subleaf: int
    register: int
    bit: int
    state: int = 0


@dataclass(frozen=True)
class Hwcap:
    """Bits of what Linux tells a process on Arm: getauxval(AT_HWCAP), or (AT_HWCAP2)."""

    second: bool
    bits: int


@dataclass(frozen=True)
class Feature:
    """name: LLVM's. flags: the words for it in /proc/cpuinfo, all of which must be there.
    found: how code that runs on the machine finds it.
    """

    name: str
    flags: tuple[str, ...]
    found: Cpuid | Hwcap


@dataclass(frozen=True)
class Level:
    """mcpu, mattr: of the target that code for it is generated for. features: what a machine must
    have, of those that `FEATURES` knows; all that mcpu and mattr promise is among them. extends:
    the level whose code, where a kernel is the same for both, is as good.
    """

    name: str
    architecture: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    extends: str = ""


def _x86(name: str, flag: str, *place: int) -> Feature:
    return Feature(name, (flag,), Cpuid(*place))


def _arm(name: str, *flags: str, bits: int, second: bool = False) -> Feature:
    return Feature(name, flags, Hwcap(second, bits))


# What LLVM uses in arithmetic of its own accord, or a kernel asks for.
FEATURES: dict[str, tuple[Feature, ...]] = {
    "x86_64": (
        _x86("sse3", "pni", 1, 0, _ECX, 0),
        _x86("ssse3", "ssse3", 1, 0, _ECX, 9),
        _x86("cx16", "cx16", 1, 0, _ECX, 13),
        _x86("sse4.1", "sse4_1", 1, 0, _ECX, 19),
        _x86("sse4.2", "sse4_2", 1, 0, _ECX, 20),
        _x86("popcnt", "popcnt", 1, 0, _ECX, 23),
        _x86("sahf", "lahf_lm", 0x80000001, 0, _ECX, 0),
        _x86("movbe", "movbe", 1, 0, _ECX, 22),
        _x86("lzcnt", "abm", 0x80000001, 0, _ECX, 5),
        _x86("bmi", "bmi1", 7, 0, _EBX, 3),
        _x86("bmi2", "bmi2", 7, 0, _EBX, 8),
        _x86("avx", "avx", 1, 0, _ECX, 28, _YMM),
        _x86("f16c", "f16c", 1, 0, _ECX, 29, _YMM),
        _x86("fma", "fma", 1, 0, _ECX, 12, _YMM),
        _x86("avx2", "avx2", 7, 0, _EBX, 5, _YMM),
        _x86("avxvnni", "avx_vnni", 7, 1, _EAX, 4, _YMM),
        _x86("avxifma", "avx_ifma", 7, 1, _EAX, 23, _YMM),
        _x86("avxvnniint8", "avx_vnni_int8", 7, 1, _EDX, 4, _YMM),
        _x86("avxneconvert", "avx_ne_convert", 7, 1, _EDX, 5, _YMM),
        _x86("gfni", "gfni", 7, 0, _ECX, 8),
        _x86("sse4a", "sse4a", 0x80000001, 0, _ECX, 6),
        _x86("xop", "xop", 0x80000001, 0, _ECX, 11, _YMM),
        _x86("fma4", "fma4", 0x80000001, 0, _ECX, 16, _YMM),
        _x86("tbm", "tbm", 0x80000001, 0, _ECX, 21),
        _x86("avx512f", "avx512f", 7, 0, _EBX, 16, _ZMM),
        _x86("avx512dq", "avx512dq", 7, 0, _EBX, 17, _ZMM),
        _x86("avx512ifma", "avx512ifma", 7, 0, _EBX, 21, _ZMM),
        _x86("avx512cd", "avx512cd", 7, 0, _EBX, 28, _ZMM),
        _x86("avx512bw", "avx512bw", 7, 0, _EBX, 30, _ZMM),
        _x86("avx512vl", "avx512vl", 7, 0, _EBX, 31, _ZMM),
        _x86("avx512vbmi", "avx512vbmi", 7, 0, _ECX, 1, _ZMM),
        _x86("avx512vbmi2", "avx512_vbmi2", 7, 0, _ECX, 6, _ZMM),
        _x86("avx512vnni", "avx512_vnni", 7, 0, _ECX, 11, _ZMM),
        _x86("avx512bitalg", "avx512_bitalg", 7, 0, _ECX, 12, _ZMM),
        _x86("avx512vpopcntdq", "avx512_vpopcntdq", 7, 0, _ECX, 14, _ZMM),
        _x86("avx512fp16", "avx512_fp16", 7, 0, _EDX, 23, _ZMM),
        _x86("avx512bf16", "avx512_bf16", 7, 1, _EAX, 5, _ZMM),
        _x86("amx-tile", "amx_tile", 7, 0, _EDX, 24, _TILES),
        _x86("amx-int8", "amx_int8", 7, 0, _EDX, 25, _TILES),
        _x86("amx-bf16", "amx_bf16", 7, 0, _EDX, 22, _TILES),
        _x86("amx-fp16", "amx_fp16", 7, 1, _EAX, 21, _TILES),
    ),
    "aarch64": (
        _arm("neon", "asimd", bits=1 << 1),
        _arm("fullfp16", "fphp", "asimdhp", bits=1 << 9 | 1 << 10),
        _arm("rdm", "asimdrdm", bits=1 << 12),
        _arm("dotprod", "asimddp", bits=1 << 20),
        _arm("fp16fml", "asimdfhm", bits=1 << 23),
        _arm("lse", "atomics", bits=1 << 8),
        _arm("sve", "sve", bits=1 << 22),
        _arm("sve2", "sve2", bits=1 << 1, second=True),
        _arm("i8mm", "i8mm", bits=1 << 13, second=True),
        _arm("bf16", "bf16", bits=1 << 14, second=True),
    ),
}

_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VNNI = (*_V4, "avx512vnni")
_TILED = (
    *_VNNI,
    "amx-bf16",
    "amx-int8",
    "amx-tile",
    "avx512bf16",
    "avx512bitalg",
    "avx512fp16",
    "avx512ifma",
    "avx512vbmi",
    "avx512vbmi2",
    "avx512vpopcntdq",
    "avxvnni",
    "gfni",
)

_ARM_PRODUCTS = ("neon", "dotprod", "fullfp16")

# Of each architecture, best last.
LEVELS = (
    Level("x86-64-v2", "x86_64", "x86-64-v2", (), _V2),
    Level("x86-64-v3", "x86_64", "x86-64-v3", (), _V3),
    Level("avxvnni", "x86_64", "x86-64-v3", ("+avxvnni",), (*_V3, "avxvnni"), "x86-64-v3"),
    Level("avx512", "x86_64", "x86-64-v4", ("+avx512vnni",), _VNNI),
    Level("amx", "x86_64", "sapphirerapids", (), _TILED, "avx512"),
    Level("armv8", "aarch64", "generic", (), ("neon",)),
    Level(
        "dotprod", "aarch64", "generic", ("+dotprod", "+fullfp16"), ("neon", "dotprod", "fullfp16")
    ),
)
_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


def architecture_named(machine: str) -> str:
    """x86_64 or aarch64 for any of their names (amd64, arm64); other names as they are."""
    return _ARCHITECTURES.get(machine.lower(), machine.lower())


def levels_of(architecture: str) -> tuple[Level, ...]:
    """The levels of an architecture, best last; none for one without levels."""
    return tuple(level for level in LEVELS if level.architecture == architecture)


def level_named(name: str) -> Level | None:
    return next((level for level in LEVELS if level.name == name), None)


def features_in(flags: set[str], architecture: str) -> frozenset[str]:
    """The features that a machine has whose /proc/cpuinfo lists `flags`."""
    known = FEATURES.get(architecture, ())
    return frozenset(feature.name for feature in known if flags.issuperset(feature.flags))
