"""Model config -> the library lib-<target>.so."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.checkpoint.config import ModelConfig
from mlcawq.checkpoint.writing import scratch_folder
from mlcawq.errors import UserError
from mlcawq.graph.settings import compile_settings, infer_quantization

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

TARGETS = ("cpu",)


@dataclass(frozen=True)
class Library:
    """path: the file; metadata: what its `_metadata` returns; target: TVM's JSON of it."""

    path: Path
    metadata: dict[str, Any]
    target: str


def resolve_target(target: str) -> Target:
    """TVM's target for `cpu` (this machine's LLVM features) or a TVM target in JSON.

    Raises UserError for a target that is not known, not compiled for here, or no valid JSON.
    """
    from mlcawq.graph._tvm import Target

    if target == "cpu":
        return _machine_target()
    try:
        given = json.loads(target)
    except json.JSONDecodeError as error:
        raise UserError.one(
            f"target {target!r} is neither {' nor '.join(TARGETS)} nor a TVM target in JSON "
            f"({error.msg})",
            fix='for example --target \'{"kind": "llvm", "mcpu": "x86-64-v3"}\'',
        ) from None
    if not isinstance(given, dict) or given.get("kind") != "llvm":
        raise UserError.one(
            f"target {target} is not supported: kernels exist for kind llvm",
            fix="use --target cpu, or a TVM target of kind llvm",
        )
    try:
        resolved = Target(given)
    except Exception as error:
        raise UserError.one(
            f"TVM does not accept the target {target}: {str(error).splitlines()[0]}"
        ) from None
    _require_native(given, target)
    return resolved


def _machine_target() -> Target:
    from mlcawq.graph._tvm import Target, tvm

    codegen = tvm.target.codegen
    target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    missing = _missing_features(str(feature) for feature in codegen.llvm_get_cpu_features(target))
    if missing:
        target = Target({"kind": "llvm", "mcpu": target.attrs["mcpu"], "mattr": missing})
    return target


def _missing_features(promised: Iterable[str]) -> list[str]:
    """LLVM's switches for what a processor's name promises and this machine does not offer.

    Virtual machines often hide AVX-512; code that uses it would die of an illegal instruction.
    Where the machine's features cannot be listed, the name is believed.
    """
    flags = _machine_flags()
    vector = [name for name in promised if name.startswith(("avx", "fma", "f16c"))]
    return sorted(f"-{name}" for name in vector if flags and name not in flags)


def _machine_flags() -> set[str]:
    """The x86 features that Linux lists, spelled as LLVM does (avx512vnni); else none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].replace("_", "").split())
    return set()


def _require_native(given: dict[str, Any], target: str) -> None:
    triple = str(given.get("mtriple", ""))
    machine = platform.machine().lower()
    native = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    if triple and triple.split("-")[0].replace("arm64", "aarch64") != native.get(machine, machine):
        raise UserError.one(
            f"target {target} is for another architecture than this machine ({machine})",
            fix="build on a machine of that architecture; cross-compiling is not supported",
        )


def target_name(target: Target) -> str:
    """The part of the library's file name: cpu for LLVM targets."""
    return "cpu" if target.kind.name == "llvm" else str(target.kind.name)


def find_compiler() -> str:
    """The C++ compiler that links libraries ($CXX, g++, clang++, c++). Raises UserError if none."""
    named = os.environ.get("CXX")
    for candidate in filter(None, (named, "g++", "clang++", "c++")):
        found = shutil.which(candidate)
        if found:
            return found
    raise UserError.one(
        "no C++ compiler was found; one is needed to link the model library",
        fix="install one (Debian: apt install g++), or name it in the environment variable CXX",
    )


def compile_model(
    config: ModelConfig,
    out_lib: Path,
    target: str | Target = "cpu",
    quantization: str | None = None,
    context_window_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Library:
    """Compile `config` for `target` and write the shared library `out_lib`, whole or not at all.

    quantization: a name to insist on; by default what the checkpoint is. Sizes are in tokens and
    sequences, with the defaults of `compile_settings`. Raises UserError for everything that can be
    known to fail before compiling. Weights are not needed.
    """
    settings = compile_settings(config, context_window_size, prefill_chunk_size, max_batch_size)
    kind = infer_quantization(config, quantization)
    compiler = find_compiler()
    resolved = resolve_target(target) if isinstance(target, str) else target

    from mlcawq.graph.pipeline import build_module, compile_module

    say = progress or (lambda stage: None)
    say("graph")
    module, metadata = build_module(config, kind, settings, resolved)
    say("code")
    executable = compile_module(module, settings, resolved, metadata)
    say("link")
    _export(executable, Path(out_lib), compiler)
    return Library(Path(out_lib), metadata, str(resolved))


def _export(executable: Any, path: Path, compiler: str) -> None:
    folder = scratch_folder(path.parent, f".{path.name}.")
    try:
        # TVM picks the linker's mode from the suffix.
        partial = folder / path.name
        try:
            executable.export_library(str(partial), cc=compiler)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise UserError.one(
                f"linking failed: {lines[-1] if lines else error}",
                compiler,
                "check that this compiler can link a shared library, or set CXX to another",
            ) from error
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
