"""Where the files shipped beside the code are found."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def templates_dir(kind: str) -> Path:
    """The folder of `kind` templates ("conversation", "recipes" or "report").

    A wheel carries templates/ inside the package; a source checkout has it beside the package.
    """
    for root in (_PACKAGE / "templates", _PACKAGE.parent / "templates"):
        if (root / kind).is_dir():
            return root / kind
    raise FileNotFoundError(f"templates/{kind} is missing from this installation of mlcawq")
