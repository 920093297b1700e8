#!/usr/bin/env python
"""The CPU target beside llama.cpp, PyTorch and mlc_llm: decode, prefill, memory, start-up.

    scripts/peers/setup_llamacpp.sh                        # once
    python scripts/bench_cpu.py                            # the whole table, about an hour
    python scripts/bench_cpu.py --models qwen-0.5b --threads 2 --contenders ours llama.cpp

Models have the shapes of released ones and random weights, the same for all; that everybody
computes the same logits, up to the rounding of 4 bits, is checked first. Every contender sits in a
process of its own and they take turns, run by run. Numbers are medians. What llama.cpp is best
with (how it keeps its weights, flash attention, mapped files) is tried beforehand, and all that is
fastest at anything takes part. The speed of reading memory is measured in the same turns.

Ours are the heads, activations and caches that `mlcawq build` offers, run as `mlcawq chat` runs
them. Each contender gets as many processors as threads, and a cache for as many tokens. A step is
timed from the token's id to its logits in memory, without sampling; peak memory is the process's
highest resident set, Python and mapped files included; the first token is that after a prompt of
32, in a new process, from before the process is there.

What is built is kept in the cache folder (about 8 GB). mlc_llm takes part where MLCAWQ_MLC_PYTHON
names an interpreter that has it. The machine should be idle; what others used is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu import contenders as entering
from benchmarks.cpu import tables
from benchmarks.cpu.contenders import (
    ACTIVATIONS,
    GGUF_KINDS,
    HEADS,
    KV_CACHE_DTYPES,
    PROJECTS,
    Contender,
)
from benchmarks.cpu.files import Files, PreparationError
from benchmarks.cpu.measures import Bench, Outcome, Part, Plan
from benchmarks.cpu.shapes import SHAPES, Shape

_ROOT = Path(__file__).resolve().parents[1]
_LLAMACPP = _ROOT / ".peers" / "llamacpp" / "bin" / "python"
_CACHE = _ROOT / ".bench" / "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    plan = Plan(
        asked.prompt, tuple(sorted(asked.contexts)), asked.tokens, asked.repeats, asked.startups
    )
    files = Files(asked.cache, _say)
    bench = Bench(plan, files, _say)
    parts: list[Part] = []
    for name in asked.models:
        shape = SHAPES[name]
        everyone = _everyone(asked, files, shape)
        for threads in asked.threads:
            entered = _chosen(asked, files, bench, shape, everyone, threads)
            outcomes = [Outcome(contender) for contender in entered]
            part = Part(shape.title, threads, outcomes, {}, shape.cached)
            most = threads == max(asked.threads)
            reference = next((c for c in entered if c.project == entering.PYTORCH), None)
            bench.measure(part, _reader(), reference, check=most)
            if most and plan.startups:
                bench.start_up(part)
            parts.append(part)
            print("\n".join(["", *tables.as_text(part, plan), ""]), flush=True)
            if asked.json:
                content = {"machine": _machine(), **tables.as_json(parts, plan)}
                asked.json.write_text(json.dumps(content, indent=1) + "\n")
            if asked.markdown:
                lines = [line for part in parts for line in tables.as_markdown(part, plan)]
                asked.markdown.write_text("\n".join(lines))
    for part in parts:
        for target in tables.targets(part, plan):
            print(target.line())


def _everyone(asked: argparse.Namespace, files: Files, shape: Shape) -> list[Contender]:
    """All that can be had; what cannot is said."""

    def llamacpp() -> list[Contender]:
        return entering.llamacpp(files, shape, asked.llamacpp_python, GGUF_KINDS)

    def mlc_llm() -> list[Contender]:
        python = entering.mlc_python()
        if python is None:
            raise PreparationError("MLCAWQ_MLC_PYTHON names no interpreter")
        return [entering.mlc_llm(files, shape, python)]

    makers = {
        entering.OURS: lambda: entering.ours(
            files,
            shape,
            asked.target,
            asked.heads,
            asked.activations,
            asked.kv_cache_dtypes,
            asked.weights,
        ),
        entering.LLAMACPP: llamacpp,
        entering.PYTORCH: lambda: entering.pytorch(files, shape, asked.torch_compile),
        entering.MLC_LLM: mlc_llm,
    }
    found: list[Contender] = []
    for project in asked.contenders:
        try:
            found += makers[project]()
        except PreparationError as error:
            _say(f"without {project}: {error}")
    if not found:
        sys.exit("nobody takes part")
    return found


def _chosen(
    asked: argparse.Namespace,
    files: Files,
    bench: Bench,
    shape: Shape,
    everyone: Sequence[Contender],
    threads: int,
) -> list[Contender]:
    """The same with those variants alone, of a project that has several, that win something.

    Ours all take part: they differ in what they compute, not in how.
    """
    found: list[Contender] = []
    for key in dict.fromkeys(contender.group for contender in everyone):
        group = [contender for contender in everyone if contender.group == key]
        if len(group) > 1:
            described = [[c.name, c.options, c.version] for c in group]
            names = files.note(
                f"{shape.name}-{key}-{threads}-threads",
                [described, threads, asked.prompt, sorted(asked.contexts)],
                lambda group=group: bench.fastest(group, threads),
                again=asked.try_again,
            )
            group = [contender for contender in group if contender.name in names]
        found += group
    return found


def _reader() -> Contender:
    here = Path(sys.executable)
    return Contender("reading memory", "", "", here, "bandwidth", {}, here)


def _machine() -> dict[str, str | int | None]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), None)
    return {"processor": model, "kernel": platform.release()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measured = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=measured)
    parser.add_argument("--contenders", nargs="+", choices=PROJECTS, default=list(PROJECTS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="of ours")
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=ACTIVATIONS,
        default=list(ACTIVATIONS),
        help="of ours; the first with all heads, the others with one",
    )
    parser.add_argument(
        "--kv-cache-dtypes",
        nargs="+",
        choices=KV_CACHE_DTYPES,
        default=list(KV_CACHE_DTYPES),
        help="likewise",
    )
    parser.add_argument("--target", default="cpu", help="of ours, as for mlcawq build")
    parser.add_argument(
        "--weights", default="auto", choices=["auto", "mapped", "resident"], help="of ours, in chat"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median")
    parser.add_argument("--startups", type=int, default=5, help="processes started; 0: none")
    parser.add_argument(
        "--torch-compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let PyTorch decode by torch.compile too",
    )
    parser.add_argument(
        "--try-again", action="store_true", help="which variants of a peer are the fastest"
    )
    parser.add_argument("--llamacpp-python", type=Path, default=_LLAMACPP)
    parser.add_argument("--cache", type=Path, default=_CACHE, help="folder for what is built")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    return parser


if __name__ == "__main__":
    main()
