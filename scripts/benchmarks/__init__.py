"""What the benchmarks in scripts/ are made of."""

import sys
from pathlib import Path

# The machine with the GPU may have the project's files without having it installed.
sys.path.append(str(Path(__file__).parents[2]))
