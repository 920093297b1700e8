"""RTN, AWQ (ours, by itself and rounded by GPTQ) and AutoAWQ on one model and one text.

    scripts/peers/setup_autoawq.sh                     # once: AutoAWQ in an environment of its own
    python scripts/compare_awq.py [MODEL] [--bits 4 3] [--text FILE] [--calib FILE]

For the model as it is, and for the same function with outlier channels (peers/outliers.py), each
method quantizes with exactly the same calibration tokens; then one scorer measures mean KL
divergence from the unquantized model, perplexity and agreement on the likeliest token, in float32.
The 4-bit folders that we write are also loaded by AutoAWQ, whose weights must be ours to the bit.
AutoAWQ is corrected to do on a CPU what it does on a GPU (peers/autoawq_runner.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peers.outliers import add_outliers
from peers.runners import AutoAwq, Ours
from peers.tables import Duel

from mlcawq.checkpoint.decoder_config import read_decoder_config
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.evaluate.compare import score_windows
from mlcawq.evaluate.metrics import estimate
from mlcawq.evaluate.scorers import open_scorer
from mlcawq.evaluate.text import cut_windows, open_tokenizer, read_text
from mlcawq.quantize.calibration import load_calibration

DEMO = Path(__file__).resolve().parent.parent / "demo"
LOGIT_TOLERANCE = 2e-2  # relative, of a model computed in float16 against float32


@dataclass(frozen=True)
class Row:
    """One quantization and what it did; divergences in millinats per token."""

    variant: str
    bits: int
    method: str
    kl: float
    kl_error: float | None
    perplexity: float
    reference_perplexity: float
    top1: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """All rows, duels, and AutoAWQ's verdicts on the folders that we wrote."""

    rows: list[Row]
    duels: list[Duel]
    verdicts: list[str]


@dataclass(frozen=True)
class Setting:
    """What every method is given: group size, calibration [S, T] and scored text [W, T]."""

    group_size: int
    calibration: np.ndarray
    windows: np.ndarray


def judge(
    variant: str, bits: int, method: str, folders: tuple[Path, Path], setting: Setting, time: float
) -> tuple[Row, np.ndarray]:
    """Score one quantized folder against the unquantized one (folders, in this order).

    Also returns the divergence at every token, in nats.
    """
    quantized, reference = (open_scorer(folder, "checkpoint") for folder in folders)
    found = score_windows(quantized, setting.windows, reference)
    divergence = found.divergence
    assert divergence is not None
    assert found.reference is not None
    assert found.kl is not None
    error = divergence.kl.standard_error
    row = Row(
        variant=variant,
        bits=bits,
        method=method,
        kl=divergence.kl.mean * 1e3,
        kl_error=None if error is None else error * 1e3,
        perplexity=found.model.perplexity,
        reference_perplexity=found.reference.perplexity,
        top1=divergence.top1.mean,
        seconds=time,
    )
    return row, found.kl


def quantize(
    runner: Ours | AutoAwq, method: str, model: Path, out: Path, bits: int, setting: Setting
) -> float:
    """Write `out`: AWQ storage at 4 bits, else dequantized. Returns the seconds it took."""
    result = runner.run(
        {
            "task": "quantize",
            "method": method,
            "model": str(model),
            "tokens": setting.calibration.tolist(),
            "bits": bits,
            "group_size": setting.group_size,
            "pack": bits == 4,
            "out": str(out),
        }
    )
    return float(result["seconds"])


def check_loading(autoawq: AutoAwq, folder: Path, setting: Setting, work: Path) -> str:
    """Have AutoAWQ load our folder; one line that says what came of it.

    Its dequantized weights must equal ours to the bit (ours rounded to float16, in which AutoAWQ
    multiplies), its logits ours within what computing in float16 costs.
    Raises UserError where they do not.
    """
    tokens = setting.windows[:2, :256]
    weights_file, logits_file = work / "weights.pt", work / "logits.pt"
    autoawq.run(
        {
            "task": "load",
            "model": str(folder),
            "tokens": tokens.tolist(),
            "weights": str(weights_file),
            "logits": str(logits_file),
        }
    )
    ours = StreamedModel(folder)
    weights = torch.load(weights_file)
    differing = [
        name
        for name, theirs in weights.items()
        if not torch.equal(theirs, ours.tensor(f"{name}.weight").T.half())
    ]
    theirs = torch.load(logits_file)
    (logits,) = ours.logits([torch.from_numpy(tokens)])
    error = float((theirs - logits).norm() / logits.norm())
    if differing or error > LOGIT_TOLERANCE:
        raise UserError.one(
            f"AutoAWQ reads {len(differing)} of {len(weights)} linears differently, and its "
            f"logits are off by {error:.1e}",
            str(folder),
        )
    return (
        f'AutoAWQ loads our model "{folder.name}": {len(weights)} linears equal to the bit, '
        f"logits (float16) within {error:.1e} of ours (float32)"
    )


def model_name(folder: Path) -> str:
    """What tables call the model in a folder; demo/model is demo."""
    return folder.parent.name if folder.name == "model" else folder.name


def compare(
    model: Path,
    bits: list[int],
    setting: Setting,
    autoawq: AutoAwq,
    work: Path,
    factor: int = 16,
    shared_heads: bool = False,
) -> Result:
    """Everything; rows go to stderr as they come."""
    ours = Ours()
    variants = {
        "as it is": model,
        f"outliers x{factor}": add_outliers(
            model, work / "outliers", factor=factor, shared_heads=shared_heads
        ),
    }
    result = Result([], [], [])
    for variant, folder in variants.items():
        readable = autoawq.readable(folder, work / f"{variant} readable")
        for width in bits:
            kl: dict[str, np.ndarray] = {}
            for method, runner, source in (
                ("rtn", ours, folder),
                ("awq", ours, folder),
                ("awq+gptq", ours, folder),
                ("AutoAWQ", autoawq, readable),
            ):
                out = work / f"{variant}, {method}, {width} bits"
                seconds = quantize(runner, method, source, out, width, setting)
                row, kl[method] = judge(variant, width, method, (out, folder), setting, seconds)
                result.rows.append(row)
                print(line(row), file=sys.stderr)
                if width == 4 and runner is ours:
                    result.verdicts.append(check_loading(autoawq, out, setting, work))
            paired = estimate(1e3 * (kl["awq"] - kl["AutoAWQ"]))
            duel = (variant, width, "awq", "AutoAWQ", paired.mean, paired.standard_error)
            result.duels.append(Duel(model_name(model), *duel))
    return result


HEADER = (
    f"{'model':<14}{'bits':>4}  {'method':<8}{'KL, millinats/token':>22}"
    f"{'perplexity (fp16)':>22}{'same top-1':>12}{'seconds':>9}"
)


def line(row: Row) -> str:
    """One line of the table."""
    kl = f"{row.kl:.3f}" + ("" if row.kl_error is None else f" ± {row.kl_error:.3f}")
    perplexity = f"{row.perplexity:.5g} ({row.reference_perplexity:.5g})"
    return (
        f"{row.variant:<14}{row.bits:>4}  {row.method:<8}{kl:>22}{perplexity:>22}"
        f"{row.top1:>11.2%} {row.seconds:>8.1f}"
    )


def load_setting(model: Path, calib: str, text: Path, arguments: argparse.Namespace) -> Setting:
    """Calibration and text as tokens of the model's own tokenizer.

    arguments: samples, seq_len, window, max_tokens and group_size.
    """
    from transformers import AutoTokenizer

    data = load_calibration(
        calib,
        AutoTokenizer.from_pretrained(model),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
    )
    # AutoAWQ takes samples of one length only.
    whole = [tokens for tokens in data.sequences if len(tokens) == arguments.seq_len]
    if not whole:
        raise UserError.one(
            f"not one block of {arguments.seq_len} tokens", calib, "a smaller --seq-len"
        )
    windows = cut_windows(
        open_tokenizer(model).encode(read_text(text)),
        window=arguments.window,
        longest=read_decoder_config(model).max_position_embeddings,
        max_tokens=arguments.max_tokens,
        where=str(text),
    )
    return Setting(arguments.group_size, torch.stack(whole).numpy(), windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO / "model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
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
        "--outliers-in-shared-heads",
        action="store_true",
        help="in v under grouped-query attention too, which AutoAWQ does not scale",
    )
    parser.add_argument("--autoawq", type=Path, help="the Python of AutoAWQ's environment")
    parser.add_argument("--keep", type=Path, help="an empty folder for all quantized models")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    try:
        autoawq = AutoAwq(arguments.autoawq)
        setting = load_setting(arguments.model, arguments.calib, arguments.text, arguments)
        with tempfile.TemporaryDirectory() as scratch:
            result = compare(
                arguments.model,
                arguments.bits,
                setting,
                autoawq,
                arguments.keep or Path(scratch),
                arguments.outlier_factor,
                arguments.outliers_in_shared_heads,
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    samples, length = setting.calibration.shape
    if arguments.json:
        document = {
            "model": str(arguments.model),
            "calibration": {"source": arguments.calib, "samples": samples, "tokens_each": length},
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
    print("\n".join([*map(line, result.rows), "", *map(str, result.duels), "", *result.verdicts]))


if __name__ == "__main__":
    main()
