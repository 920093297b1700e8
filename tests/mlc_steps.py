"""Running the plug-in in an environment with mlc_llm, and reading the folders that it makes."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlcawq.build.mlc_plugin
from mlcawq.checkpoint.config import load_json
from mlcawq.engine.artifact import TensorRecord
from mlcawq.engine.weights import as_array

ENTRY = Path(mlcawq.build.mlc_plugin.__file__).parent / "__main__.py"


def run_step(python: Path, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One step by the plug-in's path. Fails with its output when it does not succeed."""
    done = subprocess.run(
        [str(python), str(ENTRY), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 or not check, f"{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Stored:
    """A parameter as a folder has it. place: shard and offset in bytes."""

    array: np.ndarray
    place: tuple[str, int]


def read_parameters(folder: Path) -> dict[str, Stored]:
    """Every parameter of a built folder, in the order of tensor-cache.json."""
    out = {}
    for shard in load_json(folder / "tensor-cache.json")["records"]:
        data = np.fromfile(folder / shard["dataPath"], np.uint8)
        for record in shard["records"]:
            start, size = record["byteOffset"], record["nbytes"]
            described = TensorRecord(
                name=record["name"],
                shape=tuple(record["shape"]),
                dtype=record["dtype"],
                format=record["format"],
                offset=start,
                nbytes=size,
            )
            array = as_array(data[start : start + size], described)
            out[record["name"]] = Stored(array, (shard["dataPath"], start))
    return out
