"""Real text that is there wherever this project is installed: the documentation inside the Python
packages that it stands on, and the two books of demo/prose.

A document is what the docstrings of one Python file say. Paragraphs that were seen before are left
out, since packages repeat themselves. Every fiftieth document, by its name, is held out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent
# constraints.txt says which versions; PyTorch and transformers bring the others.
_PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx")
_SHORTEST = 80  # characters of a paragraph: shorter ones are mostly names and types
_HELD_OUT_EVERY = 50


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others that no training sees."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_corpus() -> Corpus:
    """All text, in one order whatever the machine. A line about each source goes to stderr."""
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])  # train, held out
    for source, folder in _sources().items():
        before = sum(map(len, parts[0]))
        for name, paragraphs in _documents(folder):
            fresh = [part for part in dict.fromkeys(paragraphs) if part not in seen]
            seen.update(fresh)
            if fresh:
                digest = hashlib.sha256(f"{source}/{name}".encode()).digest()
                held_out = int.from_bytes(digest[:4]) % _HELD_OUT_EVERY == 0
                parts[held_out].append("\n\n".join(fresh))
        size = sum(map(len, parts[0])) - before
        print(f"{source}: {size / 1e6:.1f} million characters", file=sys.stderr)
    for path in sorted((_ROOT / "demo" / "prose").glob("*.txt")):
        parts[0].append(path.read_text(encoding="utf-8").strip())
    parts[1].append((_ROOT / "demo" / "prose_heldout.txt").read_text(encoding="utf-8").strip())
    return Corpus(tuple(parts[0]), tuple(parts[1]))


def _sources() -> dict[str, Path]:
    sources = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"{package} is not installed: its documentation is a part of the text")
        sources[package] = Path(found.origin).parent
    return sources


def _documents(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and paragraphs of every Python file under `folder`."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        inside = path.relative_to(folder)
        if not {"site-packages", "dist-packages", "tests", "test"} & set(inside.parts):
            yield str(inside), list(_paragraphs(path))


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and broken examples
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = paragraph.strip("\n").rstrip()
                if len(text) >= _SHORTEST:
                    yield text
