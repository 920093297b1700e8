"""A really built tiny model for the engine's tests, loaded once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from mlcawq.engine.engine import Engine


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    from built_model import built_tiny_llama

    return built_tiny_llama()[0]


@pytest.fixture(scope="session")
def built() -> Path:
    from built_model import built_tiny_llama

    return built_tiny_llama()[1]


@pytest.fixture
def own_built(built: Path, tmp_path: Path) -> Path:
    """A copy of the built folder that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "model"))


@pytest.fixture(scope="session")
def engine(built: Path) -> Engine:
    from mlcawq.engine.engine import Engine

    return Engine(built)
