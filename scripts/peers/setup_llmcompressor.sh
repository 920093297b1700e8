#!/usr/bin/env bash
# Makes llm-compressor's environment for scripts/compare_methods.py.
#
#   scripts/peers/setup_llmcompressor.sh [FOLDER]     (default: .peers/llmcompressor; see environment.sh)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
folder=${1:-$here/../../.peers/llmcompressor}

new_environment "$folder"
"${pip[@]}" torch==2.13.0 llmcompressor==0.14.0 compressed-tensors==0.19.0 transformers==5.17.0 \
  auto-round==0.15.1 accelerate==1.15.0 datasets==5.0.1 numpy==2.4.6 safetensors==0.8.0
"$folder/bin/python" -c 'from importlib.metadata import version; print("llmcompressor", version("llmcompressor"))'
echo "$folder/bin/python"
