"""--target in mlc_llm's terms: what its --device is given, and what the library is called."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlcawq.build.chat_config import library_name
from mlcawq.build.checks import Collector
from mlcawq.build.cpu_target import without_tiles
from mlcawq.build.link import find_compiler
from mlcawq.build.targets import resolve_target, target_device
from mlcawq.build.via_mlc.interpreter import MlcInterpreter
from mlcawq.errors import Problem, UserError, raise_all

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target

# mlc_llm's own words, and the suffix of what it writes for each; a kind may be followed by
# ":generic" and the like.
_SUFFIXES = {
    "metal": ".so",
    "rocm": ".so",
    "opencl": ".so",
    "mali": ".so",
    "windows": ".dll",
    "webgpu": ".wasm",
    "iphone": ".tar",
    "macabi": ".tar",
    "android": ".tar",
    "metal:x86-64": ".dylib",
    "android:adreno-so": ".so",
}
_NVRTC = "cuda-toolkit[cccl,crt,cudart,nvrtc]>=13,<14"  # as our own extra `cuda` has it
_OURS = ("cpu", "cuda", "vulkan")
_JSON_KINDS = ("llvm", "cuda", "vulkan", "webgpu")  # those that our engine has a device for


@dataclass(frozen=True)
class MlcTarget:
    """device: the value of mlc_llm's --device. library: file name in the folder.

    target: the same as a target of our TVM, None where our engine has no such device.
    """

    device: str
    library: str
    target: Target | None

    @property
    def kind(self) -> str:
        """cpu, cuda or vulkan; empty for others."""
        return "" if self.target is None else target_device(self.target)


def resolve(asked: str, interpreter: MlcInterpreter | None, *, plugin: bool) -> MlcTarget:
    """`asked`: cpu, cuda[:sm_XX], vulkan[:portable], a TVM target in JSON, or a word of mlc_llm's.

    interpreter: None where it is not known what its TVM can generate.
    Raises UserError as `resolve_target`, for words that are nobody's, and for what that TVM cannot
    generate.
    """
    word = asked.partition(":")[0]
    given = _json(asked) if asked.lstrip().startswith("{") else None
    if given is None and word not in _OURS:
        _check_word(asked)
        _require_generator(
            asked, {"mali": "opencl", "android": "opencl"}.get(word, word), interpreter
        )
        return MlcTarget(asked, _library(asked), None)
    kind = word if given is None else str(given.get("kind"))
    if given is not None and kind not in _JSON_KINDS:
        _require_generator(asked, kind, interpreter)
        return MlcTarget(json.dumps(given), _library(kind), None)
    if kind == "vulkan" and interpreter is not None and "vulkan" in interpreter.generators:
        # Their TVM has Vulkan itself; ours, through WGSL, is the one that the engine runs.
        device = json.dumps(given) if given is not None else _own_vulkan(asked)
        return MlcTarget(device, library_name("vulkan"), resolve_target("vulkan:portable"))
    if kind in ("vulkan", "webgpu") and not plugin:
        raise UserError.one(
            "the TVM there was built without Vulkan",
            "--target",
            "leave --no-plugin out (the library then goes through WGSL), or install mlc.ai's TVM",
        )
    # mlc_llm's libraries have one variant, this machine's where nothing else is asked for.
    target = resolve_target("cpu:native" if asked == "cpu" else asked)
    if target_device(target) == "cpu":
        target = without_tiles(target)
    generator = "webgpu" if kind == "vulkan" else {"cpu": "llvm"}.get(kind, kind)
    _require_generator(asked, generator, interpreter)
    return MlcTarget(_as_json(target), library_name(target_device(target)), target)


def check_compilers(target: MlcTarget, interpreter: MlcInterpreter, *, plugin: bool) -> None:
    """Raises UserError with the compilers beside TVM that are needed for `target` and lack."""
    problems: list[Problem] = []
    collect = Collector(problems)
    if target.library.endswith(".so"):
        collect(find_compiler)
    nvcc = interpreter.cuda_compiler if os.sep in interpreter.cuda_compiler else ""
    toolkit = any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "NVCC"))
    if (
        target.kind == "cuda"
        and not toolkit
        and not (interpreter.cuda_compiler if plugin else nvcc)
    ):
        fix = f"{interpreter.python} -m pip install '{_NVRTC}', or install NVIDIA's CUDA toolkit"
        problems.append(
            Problem(
                f"{interpreter.python} has no compiler for CUDA (nvcc or NVRTC)"
                if plugin
                else "mlc_llm of itself compiles CUDA with nvcc, and there is none",
                "--target",
                fix if plugin else "install NVIDIA's CUDA toolkit, or leave --no-plugin out",
            )
        )
    raise_all(problems)


def _own_vulkan(asked: str) -> str:
    resolve_target(asked)  # whatever follows the colon is checked as in a native build
    return "vulkan:generic" if asked.endswith(":portable") else "vulkan"


def _json(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError.one(
            f"target {text} is not valid JSON ({error.msg})",
            "--target",
            'for example --target \'{"kind": "llvm", "mcpu": "x86-64-v3"}\'',
        ) from None
    return dict(given)


def _as_json(target: Target) -> str:
    """With the host, which mlc_llm would otherwise guess: for a CPU it is the CPU itself."""
    recorded = {k: v for k, v in json.loads(str(target)).items() if k not in ("tag", "keys")}
    if recorded["kind"] == "llvm":
        recorded["host"] = {k: v for k, v in recorded.items() if k != "host"}
    elif isinstance(recorded.get("host"), dict):
        host = recorded["host"]
        recorded["host"] = {k: v for k, v in host.items() if k not in ("tag", "keys")}
    # mlc_llm takes a text with one colon and no space for the name of a device.
    return json.dumps(recorded)


def _check_word(asked: str) -> None:
    """TVM's tags (nvidia/jetson-orin) and its long form are TVM's to judge."""
    word, _, rest = asked.partition(":")
    if "/" in asked or " -" in asked or word in _SUFFIXES:
        return
    known = [*_OURS, *(name for name in _SUFFIXES if ":" not in name)]
    near = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {near[0]}{':' + rest if rest else ''}? Otherwise use" if near else "use"
    raise UserError.one(
        f"target {asked!r} is not known",
        "--target",
        f"{hint} cpu, cuda, cuda:sm_XX, vulkan, vulkan:portable, a TVM target in JSON, or a "
        f"device of mlc_llm's ({', '.join(known[3:])})",
    )


def _require_generator(asked: str, kind: str, interpreter: MlcInterpreter | None) -> None:
    if interpreter is None or not interpreter.generators:
        return
    kind = {"iphone": "metal", "macabi": "metal", "windows": "opencl"}.get(kind, kind)
    if re.fullmatch(r"[a-z]+", kind) and kind not in interpreter.generators:
        raise UserError.one(
            f"the TVM {interpreter.tvm} there generates no code for {kind} (it does for "
            f"{', '.join(interpreter.generators)})",
            f"--target {asked}",
            "install an mlc.ai wheel that has it",
        )


def _library(word: str) -> str:
    suffix = _SUFFIXES.get(word, _SUFFIXES.get(word.partition(":")[0], ".so"))
    return library_name(word).removesuffix(".so") + suffix
