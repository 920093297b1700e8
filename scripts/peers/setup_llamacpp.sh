#!/usr/bin/env bash
# Makes llama.cpp's environment for scripts/bench_cpu.py: llama-cpp-python with the llama.cpp it
# brings along, compiled here for this very processor, and gguf, which writes its files.
#
#   scripts/peers/setup_llamacpp.sh [FOLDER]     (default: .peers/llamacpp; see environment.sh)
#
# Needs a C++ compiler; cmake and ninja come with the build where the machine has none. Takes about
# ten minutes of two cores. The last lines printed are the instructions that llama.cpp uses.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
folder=${1:-$here/../../.peers/llamacpp}

bare_environment "$folder"
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
"$folder/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
  --no-binary llama-cpp-python --dest "$source" llama-cpp-python==0.3.36
tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
# GCC's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads. GCC 12 leaves the
# others unwritten, and AMX dies of a general protection fault.
tiles=$source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
grep -q '_tile_loadconfig(&tc);' "$tiles"
sed -i 's/_tile_loadconfig(&tc);/__asm__ volatile("" : : "r"(\&tc) : "memory"); &/' "$tiles"
# A wheel that somebody else built would not know this processor's AVX512, VNNI or AMX.
# LLAVA_BUILD is for models that see.
options="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON"
CMAKE_ARGS="$options -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}" \
  "${pip[@]}" "$source"
"${pip[@]}" gguf==0.19.0
"$folder/bin/python" - <<'PYTHON'
from importlib.metadata import version

import llama_cpp

print("llama-cpp-python", version("llama-cpp-python"), "gguf", version("gguf"))
print(llama_cpp.llama_print_system_info().decode())
PYTHON
echo "$folder/bin/python"
