#!/usr/bin/env bash
# Makes the environment that scripts/compare_awq.py and scripts/bench_quantize_block.py measure
# against: AutoAWQ 0.2.9, its last release, with the newest transformers it works with.
#
#   scripts/peers/setup_autoawq.sh [FOLDER]     (default: .peers/autoawq; PYTHON names the interpreter)
#
# AutoAWQ itself goes in without its dependencies: it asks for triton, which on a machine without
# a GPU only turns its plain PyTorch kernels off.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${1:-$root/.peers/autoawq}

python=${PYTHON:-}
if [[ -z "$python" ]]; then
  for candidate in python3.11 python3.12 python3.10 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'pass' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
[[ -n "$python" ]] || { echo "no Python 3.10 to 3.12 found: name one with PYTHON=" >&2; exit 1; }

"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
  "${pip[@]}" --index-url "$TORCH_INDEX_URL" torch==2.13.0
else
  "${pip[@]}" torch==2.13.0
fi
"${pip[@]}" transformers==4.51.3 accelerate==1.15.0 datasets==5.0.1 zstandard safetensors numpy
"${pip[@]}" --no-deps autoawq==0.2.9
"$folder/bin/python" -W ignore -c 'import awq; print("autoawq", awq.__version__)'
echo "$folder/bin/python"
