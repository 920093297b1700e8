#!/usr/bin/env python
"""Our int4 kernels on a Vulkan device beside the WGSL that TVM's own schedules give.

    python scripts/bench_vulkan.py [--models qwen2.5-0.5b ...] [--rows 1 8 64 ...] [--dtype float32]

Shapes are the fused linears of Llama-3-8B, Qwen2.5-7B and Qwen2.5-0.5B (4 bits, groups of 128); a
driver that computes on the CPU gets the last only, unless asked otherwise. Columns are microseconds
of ours in the tiled layout, ours in AutoAWQ's stock layout, and the linear as mlc_llm compiles it
(dequantization and product under dlight's generic schedules, sums in float16), then how many times
as long as ours the latter takes, and up to 16 rows our share of the copy bandwidth measured in the
same run. Everything is checked against float64 before it is timed; times are medians over batches
of launches on random weights that are read in turn, more of them than caches hold (--rotate).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import tvm
from benchmarks.cases import MODELS
from benchmarks.cases import ROWS as ALL_ROWS
from benchmarks.vulkan import Contender, Row, Timer, WrongResultError, contenders, measure_linear

from mlcawq.engine import wgpu
from mlcawq.errors import UserError

_SOFTWARE_ROWS = (1, 4, 8, 16, 64)
_MEMORY_BOUND = 16  # rows up to which the share of the copy bandwidth is shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--linears", nargs="+", help="names of linears, qkv_proj for example")
    parser.add_argument("--rows", nargs="+", type=int, help="values of m")
    parser.add_argument("--dtype", choices=("float16", "float32"), help="of activations")
    parser.add_argument("--device", type=int, default=0, help="index of the device")
    parser.add_argument("--rotate", type=int, default=512, help="MiB of weights read in turn")
    parser.add_argument("--seconds", type=float, default=0.5, help="for one measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        wgpu.load()
        limits = wgpu.limits(arguments.device)
    except UserError as error:
        sys.exit(f"error: {error}")
    software = limits.device_type == "software"
    models = arguments.models or (["qwen2.5-0.5b"] if software else list(MODELS))
    rows = arguments.rows or (_SOFTWARE_ROWS if software else ALL_ROWS)
    dtype = arguments.dtype or ("float16" if limits.shader_f16 else "float32")
    if dtype == "float16" and not limits.shader_f16:
        sys.exit(f"error: {limits.name} has no float16; use --dtype float32")
    device = tvm.device("webgpu", arguments.device)
    timer = Timer(device, arguments.seconds / 10, arguments.seconds, arguments.rotate * 2**20)
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    named = contenders(dtype)
    copy = timer.copy_bandwidth(rng)
    head = {
        "device": limits.name,
        "driver": limits.driver,
        "activations": dtype,
        "copy_gb_per_second": round(copy / 1e9, 1),
        "seed": seed,
    }
    if not arguments.json:
        print(", ".join(f"{key}: {value}" for key, value in head.items()))
        print(_head(named))
    results = []
    for linear in (linear for model in models for linear in MODELS[model]):
        if arguments.linears and linear.name not in arguments.linears:
            continue
        try:
            found = measure_linear(linear, named, rows, dtype, timer, rng)
        except WrongResultError as error:
            sys.exit(f"error: {error} (seed {seed})")
        results += [_as_json(row, copy) for row in found]
        if not arguments.json:
            for row in found:
                print(_line(row, named, copy), flush=True)
    if arguments.json:
        print(json.dumps({**head, "rows": results}))


def _share(row: Row, copy: float) -> float | None:
    """Ours, of the copy bandwidth."""
    if row.m > _MEMORY_BOUND:
        return None
    return row.linear.bytes_read(row.m) / row.seconds["ours"] / copy


def _head(named: list[Contender]) -> str:
    columns = "".join(f"{contender.name:>14}" for contender in named)
    return f"{'model':<14}{'linear':<14}{'K':>6}{'N':>7}{'m':>6}{columns}  generic/ours  of copy"


def _line(row: Row, named: list[Contender], copy: float) -> str:
    linear, seconds, share = row.linear, row.seconds, _share(row, copy)
    times = "".join(f"{seconds[contender.name] * 1e6:>14.1f}" for contender in named)
    ratio = f"{seconds['generic'] / seconds['ours']:>13.1f}x" if "generic" in seconds else " " * 14
    end = "" if share is None else f"{share:>8.0%}"
    place = f"{linear.model:<14}{linear.name:<14}{linear.K:>6}{linear.N:>7}{row.m:>6}"
    return (place + times + ratio + end).rstrip()


def _as_json(row: Row, copy: float) -> dict[str, Any]:
    linear = row.linear
    return {
        "model": linear.model,
        "linear": linear.name,
        "K": linear.K,
        "N": linear.N,
        "m": row.m,
        "seconds": row.seconds,
        "share_of_copy": _share(row, copy),
    }


if __name__ == "__main__":
    main()
