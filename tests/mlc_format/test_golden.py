"""What we write, beside recorded descriptions of what mlc_llm writes for the same checkpoints.

The descriptions are of mlc_llm at 79d603f. The test marked `mlc_llm` compares them with the mlc_llm
at hand, and records them anew with MLCAWQ_RECORD_GOLDEN=1.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlcawq.build.gen_config import gen_config
from tests.built_model import built_tiny_llama
from tests.mlc_format.description import (
    GOLDEN,
    check_types,
    describe_files,
    describe_library,
    golden,
    shape_of,
)
from tests.mlc_steps import run_step
from tests.tiny_models import make_tiny_model

# As in tests.built_model.
SIZES = {"context_window_size": 256, "prefill_chunk_size": 32, "max_batch_size": 4}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Of a float32 llama; what mlc_llm's other families add to a folder is in "model_config" alone.
FORMAT = "llama-q0f32-cpu.json"
# Ours beside MLC's keys.
OWN_METADATA = {"architecture", "cpu_levels", "target", "weight_layout"}
# MLC's engine reads neither: one counts blocks of the compiler's plan, one is for its speculation.
_UNLIKE = ("memory_usage", "active_vocab_size")


@cache
def ours() -> dict[str, Any]:
    folder = built_tiny_llama()[1]
    return {**describe_library(folder / "lib-cpu.so"), **describe_files(folder)}


def test_functions_are_mlc_llms() -> None:
    theirs, own = golden(FORMAT)["functions"], ours()["functions"]
    assert own.keys() == theirs.keys()
    for name, parameters in theirs.items():
        # What takes and fills tensors may be a kernel of ours and a graph of theirs.
        assert own[name] is None or own[name] == parameters, name


def test_metadata_is_mlc_llms() -> None:
    theirs, own = golden(FORMAT)["metadata"], ours()["metadata"]
    assert own.keys() - theirs.keys() == OWN_METADATA
    assert theirs.keys() <= own.keys()
    for key in theirs.keys() - set(_UNLIKE) - {"params"}:
        assert own[key] == theirs[key], key
    assert list(own["params"]) == list(theirs["params"])
    vocabulary = {"vocab_size": 400}
    for name, parameter in theirs["params"].items():
        named = [vocabulary.get(size, size) for size in parameter["shape"]]
        assert own["params"][name] == {**parameter, "shape": named}
    assert own["memory_usage"].keys() >= theirs["memory_usage"].keys() - {
        name for name, parameters in ours()["functions"].items() if parameters is None
    }


def test_engine_reads_our_metadata() -> None:
    own = ours()["metadata"]
    params = [{"name": name, **parameter} for name, parameter in own["params"].items()]
    check_types({**own, "params": params}, golden("engine-reads.json")["_metadata"], "_metadata")


def test_tensor_cache_is_mlc_llms() -> None:
    assert ours()["tensor-cache.json"] == golden(FORMAT)["tensor-cache.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_config_has_mlc_llms_keys(family: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_model(tmp_path / "checkpoint", family)
    out = tmp_path / "out"
    out.mkdir()
    config = gen_config(checkpoint, out, **SIZES).config
    check_types(config, golden("engine-reads.json")["mlc-chat-config.json"], "config")
    assert_contains(config, golden(f"chat-config-{family}.json"))


def assert_contains(value: Any, wanted: Any, where: str = "config") -> None:
    """Every key of `wanted` is there, with a value of the same type, or one of them null."""
    if isinstance(wanted, dict) and isinstance(value, dict):
        for key, kind in wanted.items():
            assert key in value, f"{where} has no {key}"
            assert_contains(value[key], kind, f"{where}.{key}")
    elif isinstance(wanted, str) and wanted != "null" and value is not None:
        check_types(value, wanted, where)


@pytest.mark.mlc_llm
def test_golden_descriptions_are_those_of_mlc_llm(mlc_python: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for family in FAMILIES:
        dtype = "float32" if family == "llama" else "float16"
        # mlc_llm itself reads transformers 4's form of config.json only.
        checkpoint = make_tiny_model(tmp_path / family, family, dtype=dtype, config_form=4)
        folder = tmp_path / f"{family}-built"
        words = [checkpoint, "--quantization", f"q0f{dtype[-2:]}", "-o", folder]
        sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
        step = (mlc_python, "--stock")
        run_step(*step, "gen_config", *words, "--conv-template", "chatml", *sizes)
        config = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
        found[f"chat-config-{family}.json"] = shape_of(config)
        if family == "llama":
            library = folder / "lib-cpu.so"
            run_step(*step, "convert_weight", *words, "--device", "cpu")
            run_step(*step, "compile", folder, "--device", "cpu", "-o", library)
            found[FORMAT] = {**describe_library(library), **describe_files(folder)}
    if os.environ.get("MLCAWQ_RECORD_GOLDEN"):
        for name, description in found.items():
            text = json.dumps(description, indent=1, sort_keys=False)
            (GOLDEN / name).write_text(text + "\n", encoding="utf-8")
    for name, description in found.items():
        assert description == golden(name), name
