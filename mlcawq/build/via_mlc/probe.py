"""What an interpreter has of mlc_llm: one line of JSON after another on stdout.

This file runs inside that interpreter, given to `python -c`, and imports nothing of mlcawq. Each
line is printed as soon as its facts are known, so that an import that ends the process takes only
what would have come after it. mlc_llm's tables are read from its source: they can be known where
mlc_llm itself cannot be imported, and in no time.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from typing import Any

MARK = "mlcawq-probe "


def tell(**facts: object) -> None:
    sys.stdout.write(MARK + json.dumps(facts) + "\n")
    sys.stdout.flush()


def distributions() -> dict[str, tuple[str, list[str]]]:
    """Normalised name -> (version, requirements) of every distribution."""
    from importlib import metadata

    found: dict[str, tuple[str, list[str]]] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            name = re.sub(r"[-_.]+", "-", name).lower()
            found.setdefault(name, (distribution.version, distribution.requires or []))
    return found


def assigned(path: str, name: str) -> ast.AST | None:
    """The expression that a module assigns to `name` at its top level, None without one."""
    try:
        with open(path, encoding="utf-8") as stream:
            body = ast.parse(stream.read()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return getattr(node, "value", None)
    return None


def texts(nodes: Iterable[ast.AST]) -> list[str]:
    return [str(node.value) for node in nodes if isinstance(node, ast.Constant)]


def keys(path: str, name: str) -> list[str] | None:
    """The texts that are the keys of a table, or the members of a set; None where unreadable."""
    value = assigned(path, name)
    if isinstance(value, ast.Dict):
        return texts(key for key in value.keys if key is not None)
    if isinstance(value, (ast.Set, ast.List, ast.Tuple)):
        return texts(value.elts)
    return None


def offers_awq(model: ast.Call) -> bool:
    """Whether an entry of MODELS names both a loader and a quantizer of AWQ."""
    arguments = {word.arg: word.value for word in model.keywords}
    source, quantize = arguments.get("source"), arguments.get("quantize")
    loads = isinstance(source, ast.Dict) and "awq" in texts(key for key in source.keys if key)
    if isinstance(quantize, ast.Dict):
        return loads and "awq" in texts(key for key in quantize.keys if key)
    words = {word.arg: word.value for word in getattr(quantize, "keywords", [])}
    asked = words.get("supports_awq")
    return loads and isinstance(asked, ast.Constant) and asked.value is True


def awq_models(path: str) -> list[str] | None:
    value = assigned(path, "MODELS")
    if not isinstance(value, ast.Dict):
        return None
    entries = zip(value.keys, value.values)  # noqa: B905 (strict= is newer than this may run on)
    return [
        str(key.value)
        for key, model in entries
        if isinstance(key, ast.Constant) and isinstance(model, ast.Call) and offers_awq(model)
    ]


def options(path: str) -> list[str] | None:
    """The options that a step's parser is given; None where its source cannot be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            tree = ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError):
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return [word for call in added for word in texts(call.args) if word.startswith("-")]


def names_of_tvm(folder: str) -> list[str]:
    """Which of TVM's modules, renamed from release to release, the package imports."""
    seen: set[str] = set()
    for root, _, files in os.walk(folder):
        for file in files:
            if file.endswith(".py"):
                with open(os.path.join(root, file), encoding="utf-8", errors="replace") as stream:
                    for line in stream:
                        if line.startswith(("from tvm", "import tvm")):
                            seen.update(re.findall(r"\b(tir|tirx|s_tir|dlight)\b", line))
    return sorted(seen)


def look_at_mlc_llm(folder: str, versions: dict[str, tuple[str, list[str]]]) -> str:
    """Returns the path of the compiled module, empty where there is none."""
    names = sorted(name for name in versions if name.startswith("mlc-llm"))
    info: dict[str, Any] = {"__file__": os.path.join(folder, "libinfo.py"), "__name__": "libinfo"}
    version, module = "", ""
    try:
        with open(info["__file__"], encoding="utf-8") as stream:
            exec(compile(stream.read(), info["__file__"], "exec"), info)
        version = str(info.get("__version__", ""))
        module = (info["find_lib_path"]("mlc_llm_module", optional=True) or [""])[0]
    except Exception as error:
        tell(libinfo=str(error))
    models = os.path.join(folder, "model", "model.py")
    tell(
        mlc_llm=versions[names[0]][0] if names else version,
        mlc_llm_path=folder,
        mlc_llm_distributions=names,
        module=module,
        models=keys(models, "MODELS"),
        awq_models=awq_models(models),
        quantizations=keys(os.path.join(folder, "quantization", "quantization.py"), "QUANTIZATION"),
        conv_templates=keys(os.path.join(folder, "interface", "gen_config.py"), "CONV_TEMPLATES"),
        options={
            step: options(os.path.join(folder, "cli", step + ".py"))
            for step in ("gen_config", "convert_weight", "compile")
        },
        names_wanted=names_of_tvm(folder),
    )
    return module


def look_at_tvm() -> None:
    tell(stage="import tvm")
    import tvm
    import tvm_ffi

    try:
        from tvm_ffi.registry import list_global_func_names
    except ImportError:
        from tvm.ffi.registry import list_global_func_names
    names = list_global_func_names()
    prefix = "target.build."
    tell(
        tvm=str(tvm.__version__),
        tvm_path=tvm.__file__,
        tvm_ffi=str(getattr(tvm_ffi, "__version__", "")),
        generators=sorted(n[len(prefix) :] for n in names if n.startswith(prefix)),
        devices=sorted(n[len("device_api.") :] for n in names if n.startswith("device_api.")),
        names_present=[
            name
            for name in ("tir", "tirx", "s_tir", "dlight")
            if importlib.util.find_spec("tvm." + name)
        ],
    )


def main() -> None:
    # The steps are run by path, so that the current folder has no say in what is imported.
    sys.path[:] = [place for place in sys.path if place]
    tell(
        python=list(sys.version_info[:3]),
        executable=sys.executable,
        nvcc=shutil.which("nvcc") or "",
    )
    found = distributions()
    spec = importlib.util.find_spec("mlc_llm")
    tell(
        installed=spec is not None and bool(spec.submodule_search_locations),
        has_tvm=importlib.util.find_spec("tvm") is not None,
        versions={name: version for name, (version, _) in found.items()},
        requires={
            name: requires
            for name, (_, requires) in found.items()
            if re.match("(mlc-ai|mlc-llm|apache-tvm|tvm)(-|$)", name)
        },
    )
    if spec is None or not spec.submodule_search_locations:
        return
    module = look_at_mlc_llm(next(iter(spec.submodule_search_locations)), found)
    if importlib.util.find_spec("tvm") is None:
        return
    look_at_tvm()
    if module:
        tell(stage="import mlc_llm")
        import mlc_llm  # noqa: F401

        tell(imports=True)


main()
