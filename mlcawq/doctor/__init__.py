"""What this machine and environment can do, and what to install for the rest."""

from mlcawq.doctor.findings import Capability, Finding, Report
from mlcawq.doctor.report import examine

__all__ = ["Capability", "Finding", "Report", "examine"]
