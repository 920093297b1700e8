#!/usr/bin/env bash
# The whole road on the demo model: quantize, build for a device of this machine, ask, judge.
#
# --target TARGET   cpu (the default), vulkan, cuda; or MLCAWQ_DEMO_TARGET
# MLCAWQ_DEMO       where the results go (default: .demo in the project)
set -euo pipefail
cd "$(dirname "$0")/.."

target="${MLCAWQ_DEMO_TARGET:-cpu}"
case "${1:-}" in
  --target) target="${2:?--target wants cpu, vulkan or cuda}" ;;
  --target=*) target="${1#--target=}" ;;
  ?*)
    echo "usage: scripts/demo.sh [--target cpu|vulkan|cuda]" >&2
    exit 2
    ;;
esac

device="${target%%:*}"
case "$device" in
  cpu) . scripts/environment.sh "." ;;
  vulkan)
    . scripts/environment.sh ".[vulkan]"
    . scripts/vulkan_driver.sh
    ;;
  *) . scripts/environment.sh ".[$device]" ;;
esac

model=demo/model
out="${MLCAWQ_DEMO:-$PWD/.demo}"
built="$out/built-$device"
mkdir -p "$out"

step() { printf '\n\033[1m== %s\033[0m\n' "$*" >&2; }

step "mlcawq quantize: 4-bit AWQ, group size 128"
mlcawq quantize "$model" -o "$out/awq" --calib demo/calibration.jsonl --overwrite

step "mlcawq build: a model library for $target, checked against PyTorch"
mlcawq build "$out/awq" -o "$built" --target "$target" --overwrite

step "mlcawq chat"
for question in \
  "What is the capital of France?" \
  "What is the chemical symbol for gold?" \
  "What is 7 plus 5?" \
  "What is the opposite of hot?" \
  "How many minutes are in an hour?" \
  "Which planet is closest to the Sun?"; do
  printf 'Q: %s\n' "$question"
  printf 'A: %s\n' "$(mlcawq chat "$built" --prompt "$question" --temperature 0 2>"$out/chat.log" || {
    cat "$out/chat.log" >&2
    exit 1
  })"
done

step "mlcawq eval: held-back wordings, the 4-bit library beside the fp16 checkpoint in PyTorch"
mlcawq eval "$built" --questions demo/questions.jsonl --against "$model"

cat >&2 <<TEXT

Talk to it yourself:
  . ${venv#"$PWD"/}/bin/activate && mlcawq chat ${built#"$PWD"/}
TEXT
