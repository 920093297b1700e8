"""MLC's format in words that can be compared: a built folder's files and a library's functions.

Recorded descriptions of what mlc_llm itself makes lie in golden/; test_golden.py says how they are
recorded anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tvm

GOLDEN = Path(__file__).parent / "golden"

# Functions that are kernels: a library exports them without Relax's parameters.
KERNELS = (
    "apply_bitmask_inplace",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "gather_hidden_states",
    "gather_probs",
    "scatter_hidden_states",
    "scatter_probs",
)
_KINDS = {"str": str, "int": int, "bool": bool, "list": list, "null": type(None)}


def golden(name: str) -> Any:
    """A recorded description."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def check_types(value: Any, wanted: Any, where: str = "") -> None:
    """Fails where a JSON value is not what a schema of engine-reads.json asks for.

    A schema is a type's name, types joined by |, a list with the schema of every element, or an
    object: each key with the schema of its value, "key?" where it may be absent or null, and "*"
    for every key.
    """
    if isinstance(wanted, dict):
        assert isinstance(value, dict), f"{where} is {value!r}"
        for key, schema in wanted.items():
            name = key.rstrip("?")
            if key == "*":
                for each, found in value.items():
                    check_types(found, schema, f"{where}.{each}")
            elif name != key and value.get(name) is None:
                continue
            else:
                assert name in value, f"{where} has no {name}"
                check_types(value[name], schema, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(value, list), f"{where} is {value!r}"
        for i, element in enumerate(value):
            assert wanted, f"{where} is not empty"
            check_types(element, wanted[0], f"{where}[{i}]")
    else:
        assert any(_is(value, kind) for kind in wanted.split("|")), f"{where} is {value!r}"


def _is(value: Any, kind: str) -> bool:
    if kind == "number":
        return type(value) in (int, float)
    return type(value) is _KINDS[kind]


def shape_of(value: Any) -> Any:
    """A JSON value with its leaves replaced by the names of their types; of a list, the kinds of
    elements it has.
    """
    if isinstance(value, dict):
        return {key: shape_of(element) for key, element in sorted(value.items())}
    if isinstance(value, list):
        kinds: list[Any] = []
        for element in value:
            kind = shape_of(element)
            if kind not in kinds:
                kinds.append(kind)
        return kinds
    if type(value) in (int, float):
        return "number"
    return next(name for name, kind in _KINDS.items() if type(value) is kind)


def describe_library(path: Path) -> dict[str, Any]:
    """functions: name -> names of its parameters, None for a kernel. metadata: as it is, the
    parameters among it by name.
    """
    executable = tvm.runtime.load_module(str(path))
    text = str(executable["as_text"]())
    vm = tvm.relax.VirtualMachine(executable, tvm.cpu())
    arity, parameter = vm.module["get_function_arity"], vm.module["get_function_param_name"]
    functions: dict[str, Any] = {
        name: [str(parameter(name, i)) for i in range(int(arity(name)))]
        for name in re.findall(r"^@(\w+):", text, re.MULTILINE)
    }
    for name in KERNELS:
        if name not in functions and vm.module.implements_function(name, True):
            functions[name] = None
    metadata = json.loads(str(vm["_metadata"]()))
    metadata["params"] = {entry.pop("name"): entry for entry in metadata["params"]}
    return {"functions": dict(sorted(functions.items())), "metadata": metadata}


def describe_files(folder: Path) -> dict[str, Any]:
    """What mlc-chat-config.json and tensor-cache.json consist of: keys, and types of values."""
    names = ("mlc-chat-config.json", "tensor-cache.json")
    return {
        name: shape_of(json.loads((folder / name).read_text(encoding="utf-8"))) for name in names
    }
