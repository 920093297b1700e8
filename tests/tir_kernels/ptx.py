"""Reading PTX: the instructions of a kernel, and which parameter each access to memory goes to.

NVRTC's PTX is nearly in single-assignment form. An address belongs to the parameters that the
registers it is computed from were loaded from; what is loaded from other memory belongs to none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

_ENTRY = re.compile(r"\.entry (\w+)\([^)]*\)[^{]*\{")
_INSTRUCTION = re.compile(r"(?:@!?%?\w+\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", re.DOTALL)
_REGISTER = re.compile(r"%\w+")
_TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_GLOBAL_LOADS = ("ld.global", "cp.async.ca", "cp.async.cg")


@dataclass(frozen=True)
class Instruction:
    """opcode with its suffixes, operands as text."""

    opcode: str
    operands: str

    @property
    def written(self) -> set[str]:
        """Registers that it sets."""
        if self.opcode.startswith(("st.", "cp.async", "bar", "red.", "bra", "ret")):
            return set()
        first = re.match(r"\{[^}]*\}|[^,]*", self.operands)
        return set(_REGISTER.findall(first[0])) if first else set()

    @property
    def read(self) -> set[str]:
        """Registers that it uses, in addresses as well."""
        first = re.match(r"\{[^}]*\}|[^,]*", self.operands)
        rest = self.operands[first.end() :] if first and self.written else self.operands
        return set(_REGISTER.findall(rest))

    @property
    def bytes(self) -> int:
        """How many bytes a load, store or asynchronous copy moves for a thread."""
        if self.opcode.startswith("cp.async"):
            return int(self.operands.split(",")[2])
        vector = re.search(r"\.v(\d)", self.opcode)
        width = re.search(r"\.[busf](8|16|32|64|128)$", self.opcode)
        if width is None:
            raise ValueError(f"how wide is {self.opcode}?")
        return (int(vector[1]) if vector else 1) * _TYPE_BYTES[width[1]]


@dataclass(frozen=True)
class GlobalLoad:
    """A load or asynchronous copy from global memory; parameters: places in the signature."""

    instruction: Instruction
    parameters: frozenset[int]


@dataclass(frozen=True)
class PtxKernel:
    name: str
    instructions: tuple[Instruction, ...]

    def count(self, *opcodes: str) -> int:
        """How many instructions start with one of `opcodes`."""
        return sum(i.opcode.startswith(opcodes) for i in self.instructions)

    def global_loads(self) -> list[GlobalLoad]:
        origins = self._origins()
        loads = []
        for instruction in self.instructions:
            if not instruction.opcode.startswith(_GLOBAL_LOADS):
                continue
            if instruction.opcode.startswith("cp.async"):
                address = instruction.operands.split(",")[1]
            else:
                address = instruction.operands.rpartition("[")[2]
            found = frozenset().union(*(origins[r] for r in _REGISTER.findall(address)))
            loads.append(GlobalLoad(instruction, found))
        return loads

    def _origins(self) -> dict[str, frozenset[int]]:
        """The pointer parameters that each register's value comes from."""
        origins: dict[str, frozenset[int]] = defaultdict(frozenset)
        changed = True
        while changed:  # loops carry addresses around
            changed = False
            for instruction in self.instructions:
                if instruction.opcode.startswith("ld.param.u64"):
                    place = re.search(rf"{self.name}_param_(\d+)", instruction.operands)
                    found = frozenset([int(place[1])] if place else [])
                elif instruction.opcode.startswith(("ld.", "setp", "mma", "ldmatrix")):
                    continue
                else:
                    found = frozenset().union(*(origins[r] for r in instruction.read))
                for register in instruction.written:
                    if not found <= origins[register]:
                        origins[register] |= found
                        changed = True
        return origins


def read_ptx(text: str) -> dict[str, PtxKernel]:
    """The kernels of a PTX module by name."""
    text = re.sub(r"//[^\n]*", "", text)
    kernels = {}
    for entry in _ENTRY.finditer(text):
        body = re.sub(r"\$?\w+:\s", " ", _block(text, entry.end()))  # without labels
        instructions = []
        for statement in body.split(";"):
            # Inline assembly may stand in braces of its own, with registers of its own.
            statement = re.sub(r"^(\s*[{}]\s*)+(?=[@a-z.]|$)", "", statement).strip()
            match = _INSTRUCTION.match(statement)
            if match:
                instructions.append(Instruction(match[1], match[2] or ""))
        kernels[entry[1]] = PtxKernel(entry[1], tuple(instructions))
    return kernels


def _block(text: str, start: int) -> str:
    """From `start`, just after a brace, to the brace that closes it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise ValueError("a brace is not closed")
