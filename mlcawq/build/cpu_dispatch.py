"""The part of a CPU library that is written in C: which of its variants runs.

For every kernel NAME the library exports `__tvm_ffi_NAME`, as TVM's loader expects of any library.
It jumps to `__tvm_ffi_NAME__VARIANT` of the variant that a constructor chooses while the library is
loaded: the best one whose features the machine has, or the one that MLCAWQ_CPU_LEVEL names. Where
there is none, every kernel raises an error that says so. This part itself is for any processor of
the architecture.

A section of the file, which is read without loading it, holds the same facts as JSON for
`mlcawq.engine.cpu_library`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlcawq.engine.cpu_library import LEVEL_FUNCTION, LEVEL_VARIABLE, RECORD_SECTION
from tir_kernels.levels import FEATURES, Cpuid, Hwcap

_TILES = "amx-tile"

_START = """\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
{includes}
#define UNUSED __attribute__((unused))
#define SIGNATURE void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result

#ifdef __cplusplus
extern "C" {{
#endif

__attribute__((section("{section}"), used)) static const char record[] =
    {record};

{detection}

"""
_CPUID = """\
/* Bits of the instruction CPUID; zeros for a leaf that the processor lacks. */
static UNUSED int bit_of(uint32_t leaf, uint32_t subleaf, int which, int bit) {
  uint32_t registers[4] = {0, 0, 0, 0};
  if (!__get_cpuid_count(leaf, subleaf, registers, registers + 1, registers + 2, registers + 3)) {
    return 0;
  }
  return registers[which] >> bit & 1;
}

/* Which register files the system saves: XCR0, whose reading CPUID announces (OSXSAVE). */
static UNUSED int saves(uint32_t files) {
  uint32_t low, high;
  if (!files) return 1;
  if (!bit_of(1, 0, 2, 27)) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & files) == files;
}

/* Linux gives AMX's registers to processes that ask (arch_prctl(ARCH_REQ_XCOMP_PERM)). */
static UNUSED int may_use_tiles(void) { return syscall(158, 0x1023, 18) == 0; }"""
_HWCAP = """\
static UNUSED int has_bits(int second, unsigned long bits) {
  return (getauxval(second ? AT_HWCAP2 : AT_HWCAP) & bits) == bits;
}"""
_CHOICE = """
static int chosen = -1;
static TVMFFISafeCallType const *active = unsupported_row;
static char reason[512] =
    "this processor has none of the instruction sets that the library was compiled for ({names})";

static int unsupported(SIGNATURE) {{
  (void)self, (void)args, (void)count, (void)result;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", reason);
  return -1;
}}

__attribute__((constructor)) static void choose(void) {{
  const char *forced = getenv("{variable}");
  for (int i = {count} - 1; i >= 0; --i) {{
    if (forced && *forced && strcmp(forced, names[i])) continue;
    if (!can_run(i)) continue;
    chosen = i;
    active = kernels[i];
    return;
  }}
  if (forced && *forced) {{
    snprintf(reason, sizeof reason,
             "{variable}=%s: this library or this processor does not have it (library: {names})",
             forced);
  }}
}}

int __tvm_ffi_{function}(SIGNATURE) {{
  (void)self, (void)args, (void)count;
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = chosen;
  return 0;
}}

#define KERNEL(name, i) \\
  int __tvm_ffi_##name(SIGNATURE) {{ return active[i](self, args, count, result); }}
"""

_END = """

#ifdef __cplusplus
}
#endif
"""


@dataclass(frozen=True)
class Provided:
    """What a variant brings. features: that a machine must have. kernels: of every kernel's name
    in the library, the name that its code has for this variant, its own or another's.
    """

    name: str
    features: tuple[str, ...]
    kernels: Mapping[str, str]


def variant_symbol(kernel: str, variant: str) -> str:
    """The name of a kernel's code for a variant."""
    return f"{kernel}__{re.sub('[^0-9A-Za-z]', '_', variant)}"


def dispatch_source(architecture: str, variants: Sequence[Provided]) -> str:
    """C, and C++, for any gcc and clang. variants: best last, all with the same kernels."""
    names = sorted(variants[0].kernels)
    known = architecture in FEATURES
    x86 = architecture == "x86_64"
    includes = ["cpuid.h", "unistd.h"] if x86 else ["sys/auxv.h"] if known else []
    record = library_record(architecture, variants)
    start = _START.format(
        includes="\n".join(f"#include <{name}>" for name in includes),
        section=RECORD_SECTION,
        record=_c_string(record),
        detection=_CPUID if x86 else _HWCAP if known else "",
    )
    symbols = sorted({symbol for variant in variants for symbol in variant.kernels.values()})
    parts = [start, *(f"int __tvm_ffi_{symbol}(SIGNATURE);\n" for symbol in symbols)]
    parts.append("\nstatic int can_run(int variant) {\n  switch (variant) {\n")
    for i, variant in enumerate(variants):
        parts.append(f"    case {i}:\n      return {_test(architecture, variant.features)};\n")
    parts.append("  }\n  return 0;\n}\n\n")
    listed = ", ".join(_c_string(variant.name) for variant in variants)
    parts.append(f"static const char *const names[] = {{{listed}}};\n")
    parts.append(f"static const TVMFFISafeCallType kernels[][{max(len(names), 1)}] = {{\n")
    for variant in variants:
        row = ",\n     ".join(f"__tvm_ffi_{variant.kernels[name]}" for name in names)
        parts.append(f"    {{{row}}},\n")
    parts.append("};\nstatic int unsupported(SIGNATURE);\n")
    row = ", ".join("unsupported" for _ in names)
    parts.append(f"static const TVMFFISafeCallType unsupported_row[] = {{{row}}};\n")
    parts.append(
        _CHOICE.format(
            names=", ".join(variant.name for variant in variants),
            variable=LEVEL_VARIABLE,
            count=len(variants),
            function=LEVEL_FUNCTION,
        )
    )
    parts += [f"\nKERNEL({name}, {i})" for i, name in enumerate(names)]
    return "".join([*parts, _END])


def library_record(architecture: str, variants: Sequence[Provided]) -> str:
    """What the library's section says, for `mlcawq.engine.cpu_library.read_record`."""
    listed = [{"name": variant.name, "features": variant.features} for variant in variants]
    return json.dumps({"architecture": architecture, "variants": listed})


def _test(architecture: str, features: Sequence[str]) -> str:
    """A condition in C: the machine that runs it has `features`."""
    found = {feature.name: feature.found for feature in FEATURES.get(architecture, ())}
    state, conditions = 0, []
    for name in features:
        place = found[name]
        if isinstance(place, Cpuid):
            state |= place.state
            conditions.append(
                f"bit_of({place.leaf:#x}, {place.subleaf}, {place.register}, {place.bit})"
            )
        elif isinstance(place, Hwcap):
            conditions.append(f"has_bits({int(place.second)}, {place.bits:#x}ul)")
    if state:
        conditions.append(f"saves({state:#x})")
    if _TILES in features:  # last: asked only where all else is there
        conditions.append("may_use_tiles()")
    return " &&\n             ".join(conditions) or "1"


def _c_string(text: str) -> str:
    return json.dumps(text)
