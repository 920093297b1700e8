"""Digests of what a measurement depends on."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from peers.runners import Ours, Peer, Runner

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_OUR_CODE = ("mlcawq/quantize", "mlcawq/families", "mlcawq/checkpoint")


def digest(content: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@cache
def checkpoint_digest(folder: Path) -> str:
    """Of the weights and config.json of a checkpoint."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


@cache
def version_of(runner: Runner) -> tuple[str, str]:
    """(digest, name) of the software behind a runner.

    Of a peer: its release, PyTorch's and transformers', and our runner for it. Of ours: the code
    that quantizes and the shipped recipes. Comments and layout do not count.
    """
    script = _code(_HERE / runner.script)
    if isinstance(runner, Peer):
        releases = _releases(runner)
        return digest([releases, script]), f"{runner.name} {releases[0]}"
    assert isinstance(runner, Ours)
    files = [file for part in _OUR_CODE for file in sorted((_ROOT / part).rglob("*.py"))]
    recipes = sorted((_ROOT / "templates" / "recipes").glob("*.yaml"))
    parts = [script, *map(_code, files), *(yaml.safe_load(path.read_text()) for path in recipes)]
    return digest(parts), f"{runner.name} {_commit()}"


def _releases(peer: Peer) -> list[str]:
    asked = [peer.package, "torch", "transformers"]
    program = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    command = [str(peer.python), "-c", program, *asked]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "without git"


def _code(path: Path) -> str:
    return ast.dump(ast.parse(path.read_text(encoding="utf-8")))
