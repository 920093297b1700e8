"""Who takes part: what each needs to be made, and how its process is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.files import Files, PreparationError
from benchmarks.cpu.shapes import Shape

OURS, LLAMACPP, PYTORCH, MLC_LLM = "ours", "llama.cpp", "PyTorch", "mlc_llm"
PROJECTS = (OURS, LLAMACPP, PYTORCH, MLC_LLM)
HEADS = ("float16", "int8", "int4")
ACTIVATIONS = ("int16", "int8")
KV_CACHE_DTYPES = ("auto", "int8")
_CACHED_BYTES = {"auto": 2.0, "int8": 1 + 4 / 64}  # a scale for a head of 64
GGUF_KINDS = ("Q4_0", "Q4_K_M")
# How llama.cpp can be asked to keep its weights; none is the best for everything.
_LLAMACPP_WEIGHTS = {
    "": {"weights": "default", "mmap": True},
    "repacked": {"weights": "repack", "mmap": True},
    "plain": {"weights": "plain", "mmap": True},
    "plain, no mmap": {"weights": "plain", "mmap": False},
}
_TORCH_VARIANTS = {
    "": {"cache": "growing", "compiled": False},
    "static cache": {"cache": "static", "compiled": False},
}
_TORCH_COMPILED = {"compiled": {"cache": "static", "compiled": True}}


@dataclass(frozen=True)
class Contender:
    """project: one of PROJECTS. group: of those that compute the same in different ways, of which
    only the fastest count. weights: the file or folder that is read for every token. kind, options:
    of its worker, without threads and capacity. version: of the project, where it is another one.
    cached_bytes: of an element of a key or value.
    """

    name: str
    project: str
    group: str
    python: Path
    kind: str
    options: dict[str, Any]
    weights: Path
    version: str = ""
    cached_bytes: float = 2.0

    @property
    def weight_bytes(self) -> int:
        """All that a token reads: in these shapes the embedding is the head as well, and where a
        folder has both, a token reads one row of the one.
        """
        if self.weights.is_file():
            return self.weights.stat().st_size
        cache = self.weights / "tensor-cache.json"
        if not cache.is_file():
            return sum(path.stat().st_size for path in self.weights.glob("*.safetensors"))
        records = [
            record
            for shard in json.loads(cache.read_text())["records"]
            for record in shard["records"]
        ]
        separate = any("lm_head" in record["name"] for record in records)
        return sum(
            int(record["nbytes"])
            for record in records
            if not (separate and "embed_tokens" in record["name"])
        )


def ours(
    files: Files,
    shape: Shape,
    target: str,
    heads: Sequence[str],
    activations: Sequence[str],
    caches: Sequence[str],
    weights: str,
) -> list[Contender]:
    """What `mlcawq build` makes: each head with the first of the activations and caches, then the
    default head, or the first, with each of the others. weights: as `mlcawq chat --weights`.
    """
    kinds = [(head, activations[0], caches[0]) for head in heads]
    head = "int8" if "int8" in heads else heads[0]
    kinds += [(head, rounded, caches[0]) for rounded in activations[1:]]
    kinds += [(head, activations[0], cache) for cache in caches[1:]]
    found = []
    for head, rounded, cache in kinds:
        options = ["--target", target, "--head", head, "--activations", rounded]
        name, title = f"ours-{head}-{rounded}", f"ours, {head} head"
        if rounded != "int16":
            title += f", {rounded} activations"
        if cache != "auto":
            options += ["--kv-cache-dtype", cache]
            name, title = f"{name}-cache-{cache}", f"{title}, {cache} cache"
        folder = files.built(shape, re.sub(r"[^\w.]+", "-", f"{name}-{target}"), options)
        found.append(_engine(title, OURS, folder, shape, weights, _CACHED_BYTES[cache]))
    return found


def mlc_llm(files: Files, shape: Shape, python: str) -> Contender:
    """The same checkpoint built by an installed mlc_llm as it is, run by our engine."""
    options = ["--via", "mlc-llm", "--no-plugin", "--mlc-python", python]
    folder = files.built(shape, "mlc_llm", options)
    return _engine("mlc_llm", MLC_LLM, folder, shape)


def _engine(
    name: str,
    project: str,
    folder: Path,
    shape: Shape,
    weights: str = "auto",
    cached_bytes: float = 2.0,
) -> Contender:
    options = {"folder": str(folder), "vocabulary": shape.vocabulary, "weights": weights}
    python = Path(sys.executable)
    return Contender(
        name, project, name, python, "engine", options, folder, cached_bytes=cached_bytes
    )


def llamacpp(files: Files, shape: Shape, python: Path, kinds: Sequence[str]) -> list[Contender]:
    """All ways to run each kind of file.

    Raises PreparationError where `python` has no llama-cpp-python.
    """
    project = llamacpp_version(python)
    found = []
    for kind in kinds:
        file = files.gguf(shape, kind, python, project)
        for title, how in _LLAMACPP_WEIGHTS.items():
            for flash in (True, False):
                # Attention is one thing and the way of the weights another: without flash attention
                # only what is fastest most often is tried.
                if not flash and how["weights"] == "plain":
                    continue
                extra = ", ".join(filter(None, (title, "" if flash else "no flash")))
                name = f"llama.cpp {kind}" + (f" ({extra})" if extra else "")
                options = {"file": str(file), "vocabulary": shape.vocabulary, "flash": flash, **how}
                found.append(
                    Contender(name, LLAMACPP, kind, python, "llamacpp", options, file, project)
                )
    return found


def llamacpp_version(python: Path) -> str:
    """Raises PreparationError where there is none."""
    command = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    if python.is_file():
        done = subprocess.run([python, "-c", command], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    raise PreparationError(f"no llama-cpp-python at {python}: run scripts/peers/setup_llamacpp.sh")


def pytorch(files: Files, shape: Shape, compiled: bool) -> list[Contender]:
    """transformers in this very environment; compiled: with torch.compile too."""
    folder = files.source(shape)
    found = []
    for title, how in {**_TORCH_VARIANTS, **(_TORCH_COMPILED if compiled else {})}.items():
        name = "PyTorch bf16" + (f" ({title})" if title else "")
        options = {"folder": str(folder), "vocabulary": shape.vocabulary, **how}
        found.append(
            Contender(name, PYTORCH, "PyTorch", Path(sys.executable), "torch", options, folder)
        )
    return found


def mlc_python() -> str | None:
    """The interpreter that has mlc_llm, where one is named."""
    return os.environ.get("MLCAWQ_MLC_PYTHON")
