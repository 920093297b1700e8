#!/usr/bin/env bash
# Lint, types, tests, in an environment of the project's own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ".[dev]"
. scripts/vulkan_driver.sh

ruff check .
ruff format --check .
mypy

# One thread a process: the tests run side by side on all cores.
export OMP_NUM_THREADS=1 TVM_NUM_THREADS=1
exec python -m pytest --numprocesses "${MLCAWQ_TEST_JOBS:-auto}" --dist worksteal \
  -m "not slow and not gpu and not peers and not mlc_llm" "$@"
