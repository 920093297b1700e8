"""The shape of a doctor's report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "info", "warning", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One fact about the machine or the environment.

    area: heading it stands under; name: what was looked at; value: what was found.
    fix: an exact command or instruction where something lacks, else empty.
    """

    area: str
    name: str
    status: Status
    value: str
    fix: str = ""


@dataclass(frozen=True)
class Capability:
    """Something a user may want to do, whether it works here, and what it lacks."""

    name: str
    works: bool
    lacks: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]
    capabilities: tuple[Capability, ...]

    def find(self, name: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "capabilities": [asdict(capability) for capability in self.capabilities],
        }
