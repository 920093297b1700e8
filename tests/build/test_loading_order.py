"""The order of parameters in a built folder: that of the checkpoint's files, as mlc_llm has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlcawq.build.loading_order import loading_order
from mlcawq.checkpoint.tensors import INDEX, TensorReader


def checkpoint(folder: Path, files: dict[str, list[str]], listed: list[str]) -> TensorReader:
    where = {name: file for file, names in files.items() for name in names}
    for file, names in files.items():
        save_file({name: np.zeros(1, np.float16) for name in names}, folder / file)
    if len(files) > 1:
        index = {"weight_map": {name: where[name] for name in listed}}
        (folder / INDEX).write_text(json.dumps(index))
    return TensorReader(folder)


def test_single_file_is_read_by_name(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, {"model.safetensors": ["z", "q", "k", "a"]}, [])
    assert loading_order({"first": ["z"], "qk": ["q", "k"], "last": ["a"]}, reader) == [
        "last",
        "qk",
        "first",
    ]


def test_files_follow_one_another_as_the_index_names_them(tmp_path: Path) -> None:
    files = {"two.safetensors": ["b", "d"], "one.safetensors": ["a", "c"]}
    reader = checkpoint(tmp_path, files, ["b", "a", "c", "d"])
    assert loading_order({"A": ["a"], "B": ["b"], "CD": ["c", "d"]}, reader) == ["B", "CD", "A"]


def test_parameters_without_tensors_stay_behind_the_one_before(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, {"model.safetensors": ["a", "b"]}, [])
    sources: dict[str, list[str]] = {"start": [], "B": ["b"], "made": [], "A": ["a"]}
    assert loading_order(sources, reader) == ["start", "A", "B", "made"]
