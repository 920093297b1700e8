"""What a quantization tells of itself while it works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlcawq.quantize.budget import Needs
from mlcawq.quantize.report import BlockReport


class Progress(Protocol):
    """Told what happens; every method returns at once."""

    def traced(self, model_type: str, groups: Sequence[str]) -> None:
        """The architecture has no table; its scaling groups were found by tracing, a line each."""

    def planned(self, needs: Needs) -> None:
        """The checks have passed; work begins."""

    def started(self, blocks: int, finished: int) -> None:
        """`finished` blocks were done by an earlier run."""

    def block_done(self, report: BlockReport) -> None: ...

    def stage(self, name: str) -> None:
        """What is done after the blocks."""


class Silent:
    """Progress for nobody."""

    def traced(self, model_type: str, groups: Sequence[str]) -> None: ...

    def planned(self, needs: Needs) -> None: ...

    def started(self, blocks: int, finished: int) -> None: ...

    def block_done(self, report: BlockReport) -> None: ...

    def stage(self, name: str) -> None: ...
