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
_DYNAMIC_SHARED = re.compile(
    r"extern __shared__ (?:__align__\((?P<alignment>\d+)\) )?(?P<type>[\w ]+?) (?P<name>\w+)\[\];"
)


def kernel_names(source: str) -> list[str]:
    """The kernels that a source defines, in its order."""
    return [match[1] for match in _KERNEL.finditer(source) if match[2] == "{"]


def kernel_source(source: str, name: str) -> str:
    """C++ for one kernel of a CUDA source: its other kernels are left out.

    Raises ValueError where the source does not define it, and for sources that g++ would take
    kernel by kernel but CUDA's compilers refuse as a whole.
    """
    _check_dynamic_shared(source)
    definitions = [match for match in _KERNEL.finditer(source) if match[2] == "{"]
    if not definitions:
        raise ValueError("the source defines no kernel")
    parts = {}
    for match in definitions:
        end = source.find("\n}", match.start())
        parts[match[1]] = source[match.start() : end + 3]
    if name not in parts:
        raise ValueError(f"the source defines {', '.join(parts)}, but not {name}")
    before, body = source[: definitions[0].start()], parts[name]
    declared = [int(match["alignment"] or 16) for match in _DYNAMIC_SHARED.finditer(body)]
    pointer = r"\g<type>* const \g<name> = (\g<type>*)emulator::dynamic_shared_start();"
    body = _DYNAMIC_SHARED.sub(pointer, body)
    return f"{before}{body}\nEMULATOR_KERNEL({name}, {max(declared, default=16)})\n"


def _check_dynamic_shared(source: str) -> None:
    """A name has one type in all kernels of a source: the variables are extern."""
    types: dict[str, str] = {}
    for match in _DYNAMIC_SHARED.finditer(source):
        name, kind = match["name"], match["type"]
        if types.setdefault(name, kind) != kind:
            raise ValueError(
                f"kernels of one source declare `extern __shared__ {types[name]} {name}[]` and "
                f"`{kind} {name}[]`, which CUDA's compilers refuse: name the buffers by their type"
            )
