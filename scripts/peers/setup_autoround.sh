#!/usr/bin/env bash
# Makes AutoRound's environment for scripts/compare_methods.py.
#
#   scripts/peers/setup_autoround.sh [FOLDER]     (default: .peers/autoround; see environment.sh)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
folder=${1:-$here/../../.peers/autoround}

new_environment "$folder"
"${pip[@]}" torch==2.13.0 auto-round==0.16.1 transformers==5.23.0 \
  accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6 safetensors==0.8.0
"$folder/bin/python" -c 'from importlib.metadata import version; print("auto-round", version("auto-round"))'
echo "$folder/bin/python"
