"""`PYTHON this FOLDER TARGET OUT`, in an environment with mlc_llm: the folder's library for a GPU
is compiled through the plug-in and run on the CUDA emulator; OUT.npz gets what it computes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

IDS = np.random.default_rng(0).integers(0, 300, 130).tolist()


def run(driver: Any) -> dict[str, np.ndarray]:
    """Logits of a prompt in two chunks, of two prompts at once, and of every token of a chunk.

    TVM's attention for single tokens is left out: the emulator finds threads in it that write the
    same place of shared memory unordered.
    """
    for sequence in range(3):
        driver.add(sequence)
    return {
        "prompt": driver.prefill(0, IDS[:40]),
        "chunk": driver.prefill(0, IDS[40:77]),
        "prompts": driver.batch_prefill({1: IDS[:7], 2: IDS[:100]}),
        "verified": driver.batch_verify(1, IDS[7:27]),
    }


def main(folder: Path, target: dict[str, Any], out: Path) -> None:
    from mlcawq.build.link import Tools
    from mlcawq.build.mlc_plugin import program
    from tests.graph.library_driver import LibraryDriver
    from tests.tir_kernels.cuda_emulator import emulated_cuda, load_emulated

    made: list[Any] = []

    def keep(_tools: Tools, executable: Any, _path: Path) -> tuple[()]:
        made.append(executable)
        return ()

    Tools.link = keep  # type: ignore[method-assign, assignment]
    words = [str(folder), "--device", json.dumps(target), "-o", str(folder / "lib-cuda.so")]
    program.run("compile", words)
    import tvm

    with emulated_cuda(target["arch"]):
        driver = LibraryDriver(load_emulated(made[0]), folder, device=tvm.cuda(0))
        np.savez(out, **run(driver))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
