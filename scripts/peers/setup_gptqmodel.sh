#!/usr/bin/env bash
# Makes GPTQModel's environment for scripts/compare_methods.py.
#
#   scripts/peers/setup_gptqmodel.sh [FOLDER]     (default: .peers/gptqmodel; see environment.sh)
#
# 7.6.0, since 7.7 wants a newer torch than the other peers and would bring its CUDA build along.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
folder=${1:-$here/../../.peers/gptqmodel}

new_environment "$folder"
"${pip[@]}" torch==2.13.0 gptqmodel==7.6.0 transformers==5.23.0 torchao==0.18.0 \
  accelerate==1.15.0 datasets==5.2.0 defuser==0.0.28 tokenicer==0.0.14 numpy==2.2.6 safetensors==0.8.0
"$folder/bin/python" -c 'from importlib.metadata import version; print("gptqmodel", version("gptqmodel"))'
echo "$folder/bin/python"
