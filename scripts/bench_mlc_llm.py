#!/usr/bin/env python
"""mlc_llm's CPU library of an AWQ llama, the same with our kernels in it, and our own.

    python scripts/bench_mlc_llm.py --mlc-python PYTHON [--layers 4] [--tokens 24] [--prefill 128]

PYTHON has mlc_llm (`mlcawq doctor` says how to install it). The shape is that of Llama 3.2 1B with
fewer layers, the weights are random and the same for all three, and so are the logits, which is
checked before anything is timed. Rounds alternate; what is printed are medians, and ratios to
mlc_llm's own library in the same run. TVM_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks.library import Model, model_config

from mlcawq.build.chat_config import CONFIG_NAME, mlc_model_config
from mlcawq.graph.settings import compile_settings

QUANTIZATION = "q4f16_autoawq"
CONTENDERS = {
    "mlc_llm": ("--via", "mlc-llm", "--no-plugin"),
    "mlc_llm with our kernels": ("--via", "mlc-llm"),
    "mlcawq": (),
}
_AGREEMENT = 2e-2  # relative error of logits; mlc_llm sums products in float16


def write_config(folder: Path, layers: int, context: int, chunk: int) -> None:
    """All that the step compile reads."""
    config = model_config(layers)
    sizes = compile_settings(config, context, chunk, 1)
    content = {
        "model_type": config.model_type,
        "quantization": QUANTIZATION,
        "model_config": mlc_model_config(config, sizes),
        "vocab_size": config.vocab_size,
        "context_window_size": sizes.context_window_size,
        "prefill_chunk_size": sizes.prefill_chunk_size,
        "tensor_parallel_shards": 1,
        "weight_layout": "autoawq",
    }
    (folder / CONFIG_NAME).write_text(json.dumps(content))


def compile_library(folder: Path, name: str, mlc_python: str) -> Path:
    """The library of a contender, by the command that a user would type."""
    library = folder / f"{name.replace(' ', '_')}-cpu.so"
    options = list(CONTENDERS[name])
    if options:
        options += ["--mlc-python", mlc_python]
    command = [sys.executable, "-m", "mlcawq", "compile", str(folder), "-o", str(library)]
    done = subprocess.run([*command, *options], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{name}: the library could not be compiled")
    return library


def measure(model: Model, prompt: np.ndarray, tokens: int) -> tuple[float, float]:
    """Seconds of a prefill of `prompt`, and of the median decode step after it."""
    model.restart()
    start = time.perf_counter()
    logits = model.forward("prefill", prompt)
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(tokens):
        start = time.perf_counter()
        logits = model.forward("decode", np.array([logits.argmax()]))
        steps.append(time.perf_counter() - start)
    return prefill, median(steps)


def check_agreement(models: dict[str, Model], prompt: np.ndarray) -> dict[str, float]:
    """Relative error of each contender's logits to ours, after a prefill and two steps."""
    found: dict[str, np.ndarray] = {}
    for name, model in models.items():
        model.restart()
        rows = [model.forward("prefill", prompt)]
        rows += [model.forward("decode", np.array([token])) for token in (7, 11)]
        found[name] = np.concatenate(rows).astype(np.float64)
    ours = found["mlcawq"]
    errors = {
        name: float(np.linalg.norm(logits - ours) / np.linalg.norm(ours))
        for name, logits in found.items()
    }
    worst = max(errors.values())
    if not worst < _AGREEMENT:
        sys.exit(f"the libraries do not compute the same: {errors}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mlc-python", required=True, help="the Python that has mlc_llm")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="tokens decoded in a round")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    prompt = np.random.default_rng(1).integers(0, 1000, arguments.prefill)
    context = arguments.prefill + arguments.tokens + 16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, arguments.layers, context, arguments.prefill)
        models = {
            contender: Model(compile_library(folder, contender, arguments.mlc_python), context)
            for contender in CONTENDERS
        }
    errors = check_agreement(models, prompt)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(arguments.rounds):
        for contender, model in models.items():
            times[contender].append(measure(model, prompt, arguments.tokens))
    rows: dict[str, Any] = {}
    for contender, measured in times.items():
        prefill, step = (median(column) for column in zip(*measured, strict=True))
        rows[contender] = {
            "decode_tokens_per_second": 1 / step,
            "prefill_tokens_per_second": arguments.prefill / prefill,
            "relative_error_to_mlcawq": errors[contender],
        }
    base = rows["mlc_llm"]
    for row in rows.values():
        for kind in ("decode", "prefill"):
            key = f"{kind}_tokens_per_second"
            row[f"{kind}_ratio_to_mlc_llm"] = row[key] / base[key]
    if arguments.json:
        print(json.dumps({"layers": arguments.layers, "contenders": rows}))
        return
    print(f"{'':26}{'decode tok/s':>14}{'ratio':>8}{'prefill tok/s':>15}{'ratio':>8}{'error':>10}")
    for contender, row in rows.items():
        print(
            f"{contender:26}{row['decode_tokens_per_second']:14.2f}"
            f"{row['decode_ratio_to_mlc_llm']:8.2f}{row['prefill_tokens_per_second']:15.1f}"
            f"{row['prefill_ratio_to_mlc_llm']:8.2f}{row['relative_error_to_mlcawq']:10.1e}"
        )


if __name__ == "__main__":
    main()
