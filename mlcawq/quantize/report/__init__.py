"""What a quantization did and measured: as data, as a page, and as the model card."""

from mlcawq.quantize.report.data import (
    REPORT_FILE,
    REPORT_PAGE,
    BlockReport,
    LinearReport,
    ModelReport,
    Report,
    Run,
    Spread,
    Storage,
    Usage,
    read_report,
)

__all__ = [
    "REPORT_FILE",
    "REPORT_PAGE",
    "BlockReport",
    "LinearReport",
    "ModelReport",
    "Report",
    "Run",
    "Spread",
    "Storage",
    "Usage",
    "read_report",
]
