"""`python -m mlcawq.build.mlc_plugin STEP …`, and the same by this file's path.

By path it serves an interpreter in which mlcawq is not installed. The packages are then made
importable one by one: putting their folder on sys.path would let whatever else lies there, such as
another TVM in our site-packages, take the place of that interpreter's own.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACKAGES = ("mlcawq", "tir_kernels")
_HERE = Path(__file__).resolve().parent


class PackageFinder:
    """Finds PACKAGES, and nothing else, in `root`; their submodules are found through them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or name not in PACKAGES:
            return None
        folder = self.root / name
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def make_importable() -> None:
    """Let this interpreter import the packages that this file belongs to."""
    # A script's own folder comes first on sys.path, where its modules would pass for others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    sys.meta_path.insert(0, PackageFinder(_HERE.parents[2]))


if __name__ == "__main__":
    if not __package__:
        make_importable()
    from mlcawq.build.mlc_plugin.program import main

    sys.exit(main(sys.argv[1:]))
