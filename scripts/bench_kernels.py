#!/usr/bin/env python
"""Our int4 kernels on an NVIDIA GPU beside the best of others, in one table of one run.

    python scripts/bench_kernels.py                        # compile here, measure here
    python scripts/bench_kernels.py --prepare DIR --target cuda:sm_90 --end-to-end
    python scripts/bench_kernels.py --prebuilt DIR --end-to-end    # on the machine with the GPU
    python scripts/bench_kernels.py --dry-run --target cuda:sm_90  # without a GPU

Shapes are the fused linears of Llama-3-8B, Qwen2.5-7B and Qwen2.5-0.5B (4 bits, groups of 128) at
1 to 2048 rows. Beside our kernels run torch's float16 product (cuBLAS), torch's int4 kernel,
mlc_llm's linear under TVM's generic schedules, and humming-kernels, Marlin and torchao where they
are installed. Every result is checked against float64 before it is timed, on random data. The last
column is our share of the copy bandwidth (m <= 16) or float16 matrix rate (m >= 512) measured in
the same run. --prebuilt needs torch, numpy and apache-tvm-ffi, and of TVM what DIR holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.cases import MODELS, ROWS, Case, Linear, relative_error
from benchmarks.contenders import Contender, Generic, Ours, TorchHalf, TorchInt4
from benchmarks.end_to_end import measure_decoding
from benchmarks.measure import Results, measure_linear
from benchmarks.peers import PEERS
from benchmarks.prebuilt import Prebuilt, PreparedError
from benchmarks.report import OURS, as_json, decoding_line, table, targets, verdicts
from benchmarks.timing import ceilings


def main() -> None:
    arguments = _arguments()
    linears = [linear for name in arguments.models for linear in MODELS[name]]
    if arguments.prepare is not None:
        _prepare(arguments.prepare, arguments, linears)
    elif arguments.dry_run:
        _dry_run(arguments, linears)
    elif not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use\n  -> --dry-run, or --prepare DIR for another")
    elif arguments.prebuilt is not None:
        _measure(arguments, linears, Prebuilt(arguments.prebuilt))
    else:
        with tempfile.TemporaryDirectory(prefix="mlcawq-bench-") as folder:
            _prepare_apart(Path(folder), arguments)
            _measure(arguments, linears, Prebuilt(Path(folder)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="values of m")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, beside ours")
    parser.add_argument("--end-to-end", action="store_true", help="an 8B-shaped model as well")
    parser.add_argument("--target", default="cuda", help="cuda, or cuda:sm_XX without a GPU")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile into DIR, no more")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="measure what DIR holds")
    parser.add_argument("--dry-run", action="store_true", help="compile, and say what would run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _contenders(prebuilt: Prebuilt, only: Sequence[str] | None) -> list[Contender]:
    """All of them, ours first."""
    ours: list[Contender] = [Ours(prebuilt, "tiled", OURS), Ours(prebuilt, "stock", "stock layout")]
    others: list[Contender] = [TorchHalf(), TorchInt4(), Generic(prebuilt), *PEERS]
    return ours + [other for other in others if only is None or other.name in only]


# ------------------------------------------------------------------------------------ preparing


def _prepare(folder: Path, arguments: argparse.Namespace, linears: Sequence[Linear]) -> None:
    from benchmarks.prepare import prepare, prepare_model

    from mlcawq.errors import UserError

    try:
        prepare(folder, arguments.target, linears, _say)
        if arguments.end_to_end:
            prepare_model(folder, arguments.target, _say)
    except UserError as error:
        sys.exit(f"error: {error}")


def _prepare_apart(folder: Path, arguments: argparse.Namespace) -> None:
    """In a process of its own: TVM and what only runs its libraries do not share one."""
    command = [sys.executable, __file__, "--prepare", str(folder), "--target", arguments.target]
    command += ["--models", *arguments.models]
    if arguments.end_to_end:
        command.append("--end-to-end")
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)


def _dry_run(arguments: argparse.Namespace, linears: Sequence[Linear]) -> None:
    with tempfile.TemporaryDirectory(prefix="mlcawq-bench-") as folder:
        _prepare(Path(folder), arguments, linears)
        sizes = {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir())}
        names = [c.name for c in _contenders(Prebuilt(Path(folder)), arguments.only)]
    smallest = min(linears, key=lambda linear: linear.K * linear.N)
    _say(f"inputs of {smallest.model} {smallest.name} on the CPU")
    case = Case(smallest, "cpu", arguments.seed)
    x = case.activations(min(arguments.rows))
    product, exact = (x.to(t) @ case.dense(t) for t in (torch.float32, torch.float64))
    tiled = sum(tensor.numel() * tensor.element_size() for tensor in case.tiled)
    print(
        f"inputs: {smallest.key}, float32 product off by {relative_error(product, exact):.1e}, "
        f"tiled weights {tiled / 1e6:.1f} MB"
    )
    print("compiled: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
    print(f"would measure {', '.join(names)}, at m = {', '.join(map(str, arguments.rows))}:")
    for linear in linears:
        print(f"  {linear.model:<13}{linear.name:<14}{linear.K:>6} x {linear.N}")
    if arguments.end_to_end:
        print("and decoding with an 8B-shaped model")


# ------------------------------------------------------------------------------------ measuring


def _measure(arguments: argparse.Namespace, linears: Sequence[Linear], prebuilt: Prebuilt) -> None:
    print("\n".join(_machine(prebuilt)))
    limits = ceilings()
    print(
        f"measured here: copies move {limits.copy / 1e12:.2f} TB/s (read and written), float16 "
        f"products make {limits.multiply / 1e12:.0f} TFLOP/s; seed {arguments.seed}"
    )
    contenders = _contenders(prebuilt, arguments.only)
    results = Results()
    for linear in linears:
        _say(f"{linear.model} {linear.name}")
        measure_linear(linear, contenders, arguments.rows, arguments.seed, results)
    decoding = measure_decoding(prebuilt) if arguments.end_to_end else None
    print("\nmicroseconds")
    print("\n".join(table(results.rows, [contender.name for contender in contenders], limits)))
    if decoding is not None:
        print(f"\n{decoding_line(decoding)}")
    for name, reason in results.refused.items():
        print(f"not measured: {name}: {reason}")
    peers = [contender.name for contender in contenders if contender.peer]
    found = targets(results.rows, peers, limits, decoding)
    print("\ntargets (for an H200)")
    print("\n".join(verdicts(found)))
    if arguments.json is not None:
        content = as_json(results.rows, limits, found)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if any(name.startswith(OURS) for name in results.refused):
        sys.exit("error: a kernel of ours failed")


def _machine(prebuilt: Prebuilt) -> list[str]:
    """What this is measured on. Ends the program where the kernels are for another GPU."""
    gpu = torch.cuda.get_device_properties(0)
    try:
        manifest = prebuilt.manifest
    except PreparedError as error:
        sys.exit(f"error: {error}")
    arch = manifest["arch"]
    if arch.removesuffix("a") != f"sm_{gpu.major}{gpu.minor}":
        sys.exit(f"error: prepared for {arch}, and this GPU is sm_{gpu.major}{gpu.minor}")
    return [
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.L2_cache_size / 2**20:.0f} MiB of cache",
        f"kernels: {arch} by {manifest['compiler']}, TVM {manifest['tvm']}; "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}",
    ]


if __name__ == "__main__":
    main()
