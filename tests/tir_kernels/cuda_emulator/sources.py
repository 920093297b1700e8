"""From the CUDA source of a module to one C++ source a kernel.

A source a kernel compiles side by side with others, is cached by itself, and has its static shared
variables in a section of its own.
"""

from __future__ import annotations

import re

_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\([^;{]*\)\s*([;{])',
    re.MULTILINE,
)
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")


def kernel_names(source: str) -> list[str]:
    """The kernels that a source defines, in its order."""
    return [match[1] for match in _KERNEL.finditer(source) if match[2] == "{"]


def kernel_source(source: str, name: str) -> str:
    """C++ for one kernel of a CUDA source: its other kernels are left out.

    Raises ValueError where the source does not define it.
    """
    definitions = [match for match in _KERNEL.finditer(source) if match[2] == "{"]
    if not definitions:
        raise ValueError("the source defines no kernel")
    parts = {}
    for match in definitions:
        end = source.find("\n}", match.start())
        parts[match[1]] = source[match.start() : end + 3]
    if name not in parts:
        raise ValueError(f"the source defines {', '.join(parts)}, but not {name}")
    before = source[: definitions[0].start()]
    body = _DYNAMIC_SHARED.sub(r"\1* const \2 = (\1*)emulator::dynamic_shared();", parts[name])
    return f"{before}{body}\nEMULATOR_KERNEL({name})\n"
