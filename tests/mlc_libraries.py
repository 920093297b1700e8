"""Tiny models whose folder and library mlc_llm makes through the plug-in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlc_steps import run_step

from tests.graph.built_library import Built, Case

SIZES = {"context_window_size": 1024, "prefill_chunk_size": 256, "max_batch_size": 3}


def case(family: str, group_size: int) -> Case:
    suffix = "" if group_size == 128 else f"_g{group_size}"
    model = {"hidden": 256, "intermediate": 512, "tie": family == "qwen2"}
    # mlc_llm rounds logits to float16, and so does it between norms, activations and attention.
    return Case(family, model, {"group_size": group_size}, f"q4f16_autoawq{suffix}", 2e-2)


def built_by_mlc_llm(python: Path, ours: Built, root: Path, layout: str = "autoawq") -> Built:
    """The same checkpoint's folder, made by the plug-in; still without a library."""
    folder = root / "theirs"
    words = [root / "awq", "--quantization", ours.case.quantization, "-o", folder]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    run_step(python, "gen_config", *words, *sizes, "--weight-layout", layout)
    run_step(python, "convert_weight", *words, "--device", "cpu")
    return replace(ours, folder=folder)


def compiled(python: Path, built: Built, name: str, device: object, *words: str) -> Path:
    path = built.folder / name
    run_step(python, *words, "compile", built.folder, "--device", json.dumps(device), "-o", path)
    return path
