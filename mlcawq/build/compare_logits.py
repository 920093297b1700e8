"""When two sets of logits count as the same, and how a difference is said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Relative error ||a - b|| / ||b|| that half-precision activations may cause (measured: 1e-3 to
# 1e-2), the one of float32 sums taken in another order, and the one of activations that are rounded
# to 8 bits for every linear (measured: 6e-3 to 1.4e-2 on small models).
LIMITS = {"float16": 2e-2, "float32": 1e-4, "int8": 5e-2}
# At one position the error may be a few times that of the whole; of one token's logit, many times
# the root mean square, since the largest of a vocabulary of errors is looked at.
_POSITION = 5.0
_ELEMENT = 25.0
# A likeliest token that leads by this many times the tolerated error has to stay the likeliest.
_MARGIN = 10.0


@dataclass(frozen=True)
class Comparison:
    """Logits of one prompt, computed in one way, against the reference.

    relative_error: over all positions. worst_position: index in the prompt of the largest error,
    worst_error the relative error there. decided: positions where the reference's likeliest token
    leads clearly; agreeing: those of them where both have the same likeliest token.
    faults: what is wrong, in words; empty when the two agree.
    """

    prompt: str
    path: str
    positions: int
    relative_error: float
    worst_position: int
    worst_error: float
    decided: int
    agreeing: int
    faults: tuple[str, ...]


def compare_logits(
    got: np.ndarray, expected: np.ndarray, limit: float, prompt: str, path: str, first: int = 0
) -> Comparison:
    """Compare logits [n, V] of the positions `first`, `first` + 1, … of a prompt."""
    expected = expected.astype(np.float64)
    error = got.astype(np.float64) - expected
    finite = np.isfinite(got).all(axis=1)
    faults = []
    if not finite.all():
        at = first + int(np.argmin(finite))
        faults.append(f"position {at}: {int((~np.isfinite(got[at - first])).sum())} not finite")
        error[~finite] = np.inf
    norms = np.linalg.norm(expected, axis=1)
    with np.errstate(invalid="ignore"):
        by_position = np.linalg.norm(error, axis=1) / norms
        overall = float(np.linalg.norm(error) / np.linalg.norm(expected))
    worst = int(np.argmax(by_position))
    worst_error = float(by_position[worst])
    if not faults:
        if overall > limit:
            faults.append(f"relative error {overall:.2g}, limit {limit:g}")
        if worst_error > _POSITION * limit:
            faults.append(
                f"position {first + worst}: relative error {worst_error:.2g}, "
                f"limit {_POSITION * limit:g}"
            )
        faults += _outlier(error, norms, limit, first)
    decided, agreeing, swapped = _likeliest(got, expected, norms, limit)
    if swapped is not None and finite[swapped]:
        faults.append(
            f"position {first + swapped}: likeliest token {int(got[swapped].argmax())}, "
            f"not {int(expected[swapped].argmax())}"
        )
    return Comparison(
        prompt,
        path,
        len(got),
        overall,
        first + worst,
        worst_error,
        decided,
        agreeing,
        tuple(faults),
    )


def _outlier(error: np.ndarray, norms: np.ndarray, limit: float, first: int) -> list[str]:
    """One logit far off, which hardly shows in the norm: a broken row of the head, say."""
    scale = norms / np.sqrt(error.shape[1])
    relative = np.abs(error) / scale[:, None]
    position, token = np.unravel_index(int(np.argmax(relative)), relative.shape)
    largest = float(relative[position, token])
    if largest <= _ELEMENT * limit:
        return []
    return [
        f"position {first + int(position)}: the logit of token {int(token)} is off by "
        f"{largest:.2g} times the typical logit, limit {_ELEMENT * limit:g}"
    ]


def _likeliest(
    got: np.ndarray, expected: np.ndarray, norms: np.ndarray, limit: float
) -> tuple[int, int, int | None]:
    """(positions with a clear winner, of those agreeing, the first that disagrees)."""
    top = np.partition(expected, -2, axis=1)[:, -2:]
    noise = limit * norms / np.sqrt(expected.shape[1])
    decided = (top[:, 1] - top[:, 0]) > _MARGIN * noise
    same = got.argmax(1) == expected.argmax(1)
    wrong = np.flatnonzero(decided & ~same)
    first = int(wrong[0]) if wrong.size else None
    return int(decided.sum()), int((decided & same).sum()), first
