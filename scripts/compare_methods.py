"""Every recipe of ours beside every installed peer, by KL divergence from the unquantized model.

    scripts/peers/setup_gptqmodel.sh                   # once each: also autoawq, autoround,
                                                       # llmcompressor
    python scripts/compare_methods.py [MODEL] [--bits 4 3 2] [--methods awq+gptq "GPTQModel GPTQ"]

For the model as it is, and for the same function with outlier channels (peers/outliers.py), each
method quantizes with exactly the same calibration tokens, in its own process, asymmetric where it
has that, with its project's defaults for the rest (peers/*_runner.py say which). All are written
as dequantized float16 and judged by one scorer in float32. Peers without an environment are left
out, with a line that says how to make one; a dash is what a peer cannot do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from compare_awq import DEMO, Duel, Row, Setting, judge, prepare
from peers.outliers import add_outliers
from peers.runners import PEERS, Ours, Runner

from mlcawq.errors import UserError
from mlcawq.evaluate.metrics import estimate


@dataclass(frozen=True)
class Contender:
    """A method of a quantizer; `label` is what the table calls it."""

    label: str
    runner: Runner

    @property
    def ours(self) -> bool:
        return isinstance(self.runner, Ours)


@dataclass(frozen=True)
class Dash:
    """What a peer cannot do, in its runner's words."""

    variant: str
    bits: int
    method: str
    reason: str


@dataclass
class Result:
    """Everything in the order in which it came."""

    rows: list[Row | Dash] = field(default_factory=list)
    duels: list[Duel] = field(default_factory=list)


def find_contenders(
    methods: Sequence[str] | None = None, pythons: dict[str, Path | None] | None = None
) -> tuple[list[Contender], list[str]]:
    """Our methods and those of the peers that are there, and a line for each peer that is not.

    methods: labels to take; None takes all.
    pythons: interpreters by the peers' keys, instead of where they are looked for.
    Raises UserError for a label that nobody has, and where nobody is left.
    """
    known = [label for runner in (Ours, *PEERS) for label in runner.methods]
    unknown = [label for label in methods or [] if label not in known]
    if unknown:
        raise UserError.one(
            f"no such method: {', '.join(unknown)}", "--methods", f"one of: {', '.join(known)}"
        )
    runners: list[Runner] = [Ours()]
    absent = []
    for peer in PEERS:
        if methods and not any(label in methods for label in peer.methods):
            continue
        try:
            runners.append(peer((pythons or {}).get(peer.key)))
        except UserError as error:
            absent.append(str(error))
    found = [
        Contender(label, runner)
        for runner in runners
        for label in runner.methods
        if not methods or label in methods
    ]
    if not found:
        raise UserError.one("no method is left to compare", "; ".join(absent))
    return found, absent


def compare(
    variants: dict[str, Path],
    bits: Sequence[int],
    setting: Setting,
    contenders: Sequence[Contender],
    work: Path,
) -> Result:
    """Quantize and judge everything; lines go to stderr as they come.

    variants: checkpoints by name. work: an empty folder, for what the methods write.
    """
    result = Result()
    for variant, folder in variants.items():
        readable = {
            runner: runner.readable(folder, work / f"{variant} for {runner.name}")
            for runner in {contender.runner for contender in contenders}
        }
        for width in bits:
            divergences: dict[Contender, np.ndarray] = {}
            for contender in contenders:
                out = work / f"{variant}, {contender.label}, {width} bits"
                answer = contender.runner.run(
                    {
                        "task": "quantize",
                        "method": contender.runner.methods[contender.label],
                        "model": str(readable[contender.runner]),
                        "tokens": setting.calibration.tolist(),
                        "bits": width,
                        "group_size": setting.group_size,
                        "pack": False,
                        "out": str(out),
                    }
                )
                row: Row | Dash
                if "cannot" in answer:
                    row = Dash(variant, width, contender.label, answer["cannot"])
                else:
                    seconds = float(answer["seconds"])
                    row, divergences[contender] = judge(
                        variant, width, contender.label, (out, folder), setting, seconds
                    )
                result.rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
            found = duels(variant, width, divergences)
            result.duels += found
            print(*found, sep="\n", end="\n" if found else "", file=sys.stderr, flush=True)
    return result


def duels(variant: str, bits: int, divergences: dict[Contender, np.ndarray]) -> list[Duel]:
    """Our method of least mean divergence against each peer's.

    divergences: at every token, in nats.
    """
    ours = [contender for contender in divergences if contender.ours]
    if not ours:
        return []
    best = min(ours, key=lambda contender: float(divergences[contender].mean()))
    found = []
    for peer, divergence in divergences.items():
        if not peer.ours:
            paired = estimate(1e3 * (divergences[best] - divergence))
            found.append(
                Duel(variant, bits, best.label, peer.label, paired.mean, paired.standard_error)
            )
    return found


HEADER = (
    f"{'model':<14}{'bits':>4}  {'method':<20}{'KL, millinats/token':>22}"
    f"{'perplexity (fp16)':>22}{'same top-1':>12}{'seconds':>9}"
)


def line(row: Row | Dash) -> str:
    """One line of the table."""
    start = f"{row.variant:<14}{row.bits:>4}  {row.method:<20}"
    if isinstance(row, Dash):
        return f"{start}{'-':>22}{'-':>22}{'-':>12}{'-':>9}  {row.reason}"
    kl = f"{row.kl:.3f}" + ("" if row.kl_error is None else f" ± {row.kl_error:.3f}")
    perplexity = f"{row.perplexity:.5g} ({row.reference_perplexity:.5g})"
    return f"{start}{kl:>22}{perplexity:>22}{row.top1:>12.2%}{row.seconds:>9.1f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO / "model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    parser.add_argument(
        "--calib", default=str(DEMO / "calibration.jsonl"), help="as of `mlcawq quantize`"
    )
    parser.add_argument("--samples", type=int, default=32, help="blocks of calibration tokens")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a block")
    parser.add_argument("--text", type=Path, default=DEMO / "prose_heldout.txt")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--outlier-factor", type=int, default=16, help="a power of two")
    parser.add_argument(
        "--variants", nargs="+", default=["plain", "outliers"], choices=["plain", "outliers"]
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these, as in the table"
    )
    for peer in PEERS:
        parser.add_argument(
            f"--{peer.key}", type=Path, help=f"the Python of {peer.name}'s environment"
        )
    parser.add_argument("--keep", type=Path, help="an empty folder for all quantized models")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    try:
        contenders, absent = find_contenders(
            arguments.methods, {peer.key: getattr(arguments, peer.key) for peer in PEERS}
        )
        setting = prepare(arguments)
        with tempfile.TemporaryDirectory() as scratch:
            work = arguments.keep or Path(scratch)
            variants = {}
            if "plain" in arguments.variants:
                variants["as it is"] = arguments.model
            if "outliers" in arguments.variants:
                factor = arguments.outlier_factor
                variants[f"outliers x{factor}"] = add_outliers(
                    arguments.model, work / "outliers", factor=factor
                )
            result = compare(variants, arguments.bits, setting, contenders, work)
    except UserError as error:
        sys.exit(f"error: {error}")
    samples, length = setting.calibration.shape
    if arguments.json:
        document = {
            "model": str(arguments.model),
            "group_size": setting.group_size,
            "calibration": {"source": arguments.calib, "samples": samples, "tokens_each": length},
            "absent": absent,
            **asdict(result),
        }
        print(json.dumps(document, indent=2))
        return
    count, window = setting.windows.shape
    print(
        f"{arguments.model}: group size {setting.group_size}, calibrated on {samples} x {length} "
        f"tokens of {arguments.calib},\nscored on {count} windows of {window} tokens of "
        f"{arguments.text}\n\n{HEADER}"
    )
    print("\n".join([*map(line, result.rows), "", *map(str, result.duels), "", *absent]))


if __name__ == "__main__":
    main()
