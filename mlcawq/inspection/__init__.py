"""What a folder, a weight file or a library is, told from its contents."""

from mlcawq.inspection.describe import describe
from mlcawq.inspection.description import Description

__all__ = ["Description", "describe"]
