"""Results as text: a table a model, a table a bit width in Markdown, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peers.runners import SYMMETRIC_CLIPPING
from peers.store import Result

from mlcawq.evaluate.metrics import estimate

# Of ours and theirs that do the same thing.
_SAME = (
    ("awq", "AutoAWQ"),
    ("awq", "GPTQModel AWQ"),
    ("awq", "llm-compressor AWQ"),
    ("awq", SYMMETRIC_CLIPPING),
)


@dataclass(frozen=True)
class Duel:
    """KL divergence of a method of ours minus another's: mean and error in millinats per token.

    Paired over the same tokens, so that it is surer than the difference of the two means: below
    zero, ours is closer to the original.
    """

    model: str
    variant: str
    bits: int
    ours: str
    peer: str
    difference: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return (
            f"{self.model} {self.variant}, {self.bits} bits: KL of {self.ours} - KL of "
            f"{self.peer} = {self.difference:+.3f}{error} millinats/token"
        )


def duels(results: Sequence[Result]) -> list[Duel]:
    """Our closest method against every peer's, and methods that are the same against each other."""
    found = []
    for place in dict.fromkeys(map(_place, results)):
        scored = {
            result.cell.method: result
            for result in results
            if _place(result) == place and result.score is not None
        }
        ours = [method for method, result in scored.items() if result.cell.ours]
        if not ours:
            continue
        best = min(ours, key=lambda method: _mean(scored[method]))
        peers = [method for method in scored if method not in ours]
        pairs = [(best, peer) for peer in peers]
        pairs += [(a, b) for a, b in _SAME if a in scored and b in scored and (a, b) not in pairs]
        found += [_duel(scored[a], scored[b]) for a, b in pairs]
    return found


def _place(result: Result) -> tuple[str, str, int]:
    return result.cell.model, result.cell.variant, result.cell.bits


def _mean(result: Result) -> float:
    assert result.score is not None
    return result.score.millinats.mean


def _duel(ours: Result, peer: Result) -> Duel:
    assert ours.score is not None
    assert peer.score is not None
    paired = estimate(1e3 * (ours.score.kl - peer.score.kl))
    return Duel(
        *_place(ours), ours.cell.method, peer.cell.method, paired.mean, paired.standard_error
    )


HEADER = (
    f"{'model':<24}{'bits':>4}  {'method':<20}{'KL, millinats/token':>22}"
    f"{'perplexity (fp16)':>22}{'same top-1':>12}{'seconds':>9}"
)


def line(result: Result) -> str:
    """One line of the table."""
    cell, score = result.cell, result.score
    start = f"{cell.model + ' ' + cell.variant:<24}{cell.bits:>4}  {cell.method:<20}"
    if score is None:
        return f"{start}{'-':>22}{'-':>22}{'-':>12}{'-':>9}  {result.reason}"
    kl = score.millinats
    said = f"{kl.mean:.3f}" + ("" if kl.standard_error is None else f" ± {kl.standard_error:.3f}")
    perplexity = f"{score.perplexity:.5g} ({score.reference_perplexity:.5g})"
    return f"{start}{said:>22}{perplexity:>22}{score.top1:>12.2%}{result.seconds:>9.1f}"


def markdown(results: Sequence[Result]) -> Iterator[str]:
    """Lines: for each width a table of divergences, a row a method, a column a model.

    The least divergence of a column is bold; a dash is what a peer cannot do.
    """
    for bits in dict.fromkeys(result.cell.bits for result in results):
        here = [result for result in results if result.cell.bits == bits]
        columns = list(dict.fromkeys((r.cell.model, r.cell.variant) for r in here))
        by_place = {(r.cell.method, r.cell.model, r.cell.variant): r for r in here}
        least = {
            column: min(
                (_mean(r) for r in here if _place(r)[:2] == column and r.score is not None),
                default=None,
            )
            for column in columns
        }
        titles = [model if variant == "as it is" else f"… {variant}" for model, variant in columns]
        yield f"| KL divergence at {bits} bits, millinats a token | " + " | ".join(titles) + " |"
        yield "|---|" + "---:|" * len(columns)
        for method in dict.fromkeys(result.cell.method for result in here):
            entries = []
            for column in columns:
                result = by_place.get((method, *column))
                if result is None:
                    entries.append("")
                elif result.score is None:
                    entries.append("–")
                else:
                    mean = _mean(result)
                    entries.append(f"**{mean:.4g}**" if mean == least[column] else f"{mean:.4g}")
            yield f"| {method} | " + " | ".join(entries) + " |"
        yield ""
