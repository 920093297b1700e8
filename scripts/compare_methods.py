"""Every recipe of ours beside every installed peer, by KL divergence from the unquantized model.

    python -m scripts.language_models.train            # once: small models of several families
    scripts/peers/setup_gptqmodel.sh                   # once each: also autoawq, autoround,
                                                       # llmcompressor
    python scripts/compare_methods.py [MODEL ...] [--bits 4 3 2] [--only ours|peers]

For each model as it is, and for the same function with outlier channels (peers/outliers.py), each
method quantizes with exactly the same calibration tokens, in its own process, asymmetric where it
has that, with its project's defaults for the rest (peers/*_runner.py say which). All are written
as dequantized float16 and judged by one scorer in float32. Peers without an environment are left
out, with a line that says how to make one; a dash is what a peer cannot do.

What was measured is kept in --store and taken from there for as long as checkpoint, tokens, method
and software are the same, so that a run that was stopped goes on, and a change of our code repeats
ours alone. --stored measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from compare_awq import DEMO, Setting, load_setting, model_name
from peers.outliers import add_outliers
from peers.runners import PEERS, Ours, Runner
from peers.store import Cell, Result, Score, Store
from peers.tables import HEADER, duels, line, markdown
from peers.versions import checkpoint_digest, digest, version_of

from mlcawq.errors import UserError
from mlcawq.evaluate.compare import score_windows
from mlcawq.evaluate.scorers import open_scorer

BENCH = Path(__file__).resolve().parent.parent / ".bench"


@dataclass(frozen=True)
class Contender:
    """A method of a quantizer; `label` is what the table calls it."""

    label: str
    runner: Runner

    @property
    def ours(self) -> bool:
        return isinstance(self.runner, Ours)


@dataclass(frozen=True)
class Subject:
    """A checkpoint to quantize, and what every method is given for it."""

    model: str
    variant: str
    folder: Path
    setting: Setting

    def cell(self, contender: Contender, bits: int) -> Cell:
        """The measurement of a contender on this, at a width."""
        job = _method(contender, bits, self.setting.group_size)
        tokens = [self.setting.calibration.tolist(), self.setting.windows.tolist()]
        setting = digest([checkpoint_digest(self.folder), tokens, contender.runner.name, job])
        label, ours = contender.label, contender.ours
        return Cell(
            self.model, self.variant, bits, label, ours, setting, *version_of(contender.runner)
        )


def find_contenders(
    methods: Sequence[str] | None = None,
    pythons: dict[str, Path | None] | None = None,
    only: str | None = None,
) -> tuple[list[Contender], list[str]]:
    """Our methods and those of the peers that are there, and a line for each peer that is not.

    methods: labels to take; None takes all.
    pythons: interpreters by the peers' keys, instead of where they are looked for.
    only: "ours" or "peers".
    Raises UserError for a label that nobody has, and where nobody is left.
    """
    known = [label for runner in (Ours, *PEERS) for label in runner.methods]
    unknown = [label for label in methods or [] if label not in known]
    if unknown:
        raise UserError.one(
            f"no such method: {', '.join(unknown)}", "--methods", f"one of: {', '.join(known)}"
        )
    runners: list[Runner] = [] if only == "peers" else [Ours()]
    absent = []
    for peer in PEERS:
        if only == "ours" or (methods and not any(label in methods for label in peer.methods)):
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
    subjects: Sequence[Subject],
    bits: Sequence[int],
    contenders: Sequence[Contender],
    store: Store,
    *,
    measuring: bool = True,
) -> Iterator[Result]:
    """Results in order, measured where the store does not have them; lines go to stderr.

    measuring: else what the store has is all there is, of other versions too.
    """
    for subject in subjects:
        for width in bits:
            for contender in contenders:
                cell = subject.cell(contender, width)
                result = store.find(cell, any_version=not measuring)
                if result is None and measuring:
                    try:
                        result = measure(subject, contender, cell)
                    except UserError as error:
                        print(f"{contender.label}: {error}", file=sys.stderr, flush=True)
                        yield Result(cell, reason="failed")
                        continue
                    store.add(result)
                    print(line(result), file=sys.stderr, flush=True)
                if result is not None:
                    yield result


def measure(subject: Subject, contender: Contender, cell: Cell) -> Result:
    """Quantize in a process of its own, and judge. Raises UserError where that process fails."""
    runner, setting = contender.runner, subject.setting
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "quantized"
        answer = runner.run(
            {
                "task": "quantize",
                **_method(contender, cell.bits, setting.group_size),
                "model": str(runner.readable(subject.folder, Path(scratch) / "readable")),
                "tokens": setting.calibration.tolist(),
                "pack": False,
                "out": str(out),
            }
        )
        if "cannot" in answer:
            return Result(cell, reason=answer["cannot"])
        score = judge(out, subject.folder, setting.windows)
    return Result(cell, float(answer["seconds"]), score)


def judge(quantized: Path, original: Path, windows: np.ndarray) -> Score:
    """Score one folder against the other on token ids [W, T]."""
    found = score_windows(
        open_scorer(quantized, "checkpoint"), windows, open_scorer(original, "checkpoint")
    )
    assert found.kl is not None
    assert found.reference is not None
    assert found.divergence is not None
    top1 = found.divergence.top1.mean
    return Score.of(found.kl, found.model.perplexity, found.reference.perplexity, top1)


def _method(contender: Contender, bits: int, group_size: int) -> dict[str, object]:
    """The part of a job that says what is to be done."""
    method = contender.runner.methods[contender.label]
    options = contender.runner.options.get(contender.label, {})
    return {"method": method, "bits": bits, "group_size": group_size, **options}


def find_models() -> list[Path]:
    """The demo model, and what scripts/language_models has trained."""
    trained = (path.parent for path in (BENCH / "models").glob("*/config.json"))
    return [DEMO / "model", *sorted(trained)]


def load_subjects(arguments: argparse.Namespace, work: Path) -> list[Subject]:
    """The models and their variants, made in the folder `work`, with their tokens."""
    subjects = []
    for folder in arguments.models or find_models():
        name = model_name(folder)
        setting = load_setting(
            folder,
            arguments.calib or str(folder.parent / "calibration.jsonl"),
            arguments.text or _held_out(folder),
            arguments,
        )
        if "plain" in arguments.variants:
            subjects.append(Subject(name, "as it is", folder, setting))
        if "outliers" in arguments.variants:
            factor = arguments.outlier_factor
            grown = add_outliers(folder, work / f"{name} with outliers", factor=factor)
            subjects.append(Subject(name, f"outliers x{factor}", grown, setting))
    return subjects


def _held_out(folder: Path) -> Path:
    found = sorted(folder.parent.glob("*heldout.txt"))
    if not found:
        raise UserError.one("no *heldout.txt there", str(folder.parent), "name a text with --text")
    return found[0]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    parser.add_argument(
        "--calib", help="as of `mlcawq quantize` (default: calibration.jsonl beside a model)"
    )
    parser.add_argument("--samples", type=int, default=128, help="blocks of calibration tokens")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a block")
    parser.add_argument("--text", type=Path, help="scored (default: *heldout.txt beside a model)")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--outlier-factor", type=int, default=16, help="a power of two")
    parser.add_argument(
        "--variants", nargs="+", default=["plain", "outliers"], choices=["plain", "outliers"]
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these, as in the table"
    )
    parser.add_argument("--only", choices=["ours", "peers"])
    for peer in PEERS:
        parser.add_argument(
            f"--{peer.key}", type=Path, help=f"the Python of {peer.name}'s environment"
        )
    parser.add_argument("--store", type=Path, default=BENCH / "methods.jsonl")
    parser.add_argument(
        "--stored", action="store_true", help="measure nothing; also of other versions"
    )
    parser.add_argument("--markdown", action="store_true", help="tables of divergences alone")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    try:
        contenders, absent = find_contenders(
            arguments.methods,
            {peer.key: getattr(arguments, peer.key) for peer in PEERS},
            arguments.only,
        )
        with tempfile.TemporaryDirectory() as scratch:
            subjects = load_subjects(arguments, Path(scratch))
            found = compare(
                subjects,
                arguments.bits,
                contenders,
                Store(arguments.store),
                measuring=not arguments.stored,
            )
            results = list(found)
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        document = {
            "results": [asdict(result) for result in results],
            "duels": [asdict(duel) for duel in duels(results)],
            "absent": absent,
        }
        print(json.dumps(document, indent=2))
    elif arguments.markdown:
        print("\n".join(markdown(results)))
    else:
        print(_described(subjects))
        print("\n".join([HEADER, *map(line, results), "", *map(str, duels(results)), "", *absent]))
    if any(result.reason == "failed" for result in results):
        sys.exit(1)


def _described(subjects: Sequence[Subject]) -> str:
    """What was quantized and scored, a line a model."""
    lines = {}
    for subject in subjects:
        setting = subject.setting
        samples, length = setting.calibration.shape
        count, window = setting.windows.shape
        lines[subject.model] = (
            f"{subject.model}: group size {setting.group_size}, calibrated on {samples} x {length} "
            f"tokens, scored on {count} windows of {window}"
        )
    return "\n".join([*lines.values(), ""])


if __name__ == "__main__":
    main()
