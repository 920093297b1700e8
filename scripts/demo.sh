#!/usr/bin/env bash
# The whole road on the demo model: quantize, build for this CPU, ask, judge.
#
# MLCAWQ_DEMO    where the results go (default: .demo in the project)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh "."

model=demo/model
out="${MLCAWQ_DEMO:-$PWD/.demo}"
mkdir -p "$out"

step() { printf '\n\033[1m== %s\033[0m\n' "$*" >&2; }

step "mlcawq quantize: 4-bit AWQ, group size 128"
mlcawq quantize "$model" -o "$out/awq" --calib demo/calibration.jsonl --overwrite

step "mlcawq build: a model library for this CPU, checked against PyTorch"
mlcawq build "$out/awq" -o "$out/built" --target cpu --overwrite

step "mlcawq chat"
for question in \
  "What is the capital of France?" \
  "What is the chemical symbol for gold?" \
  "What is 7 plus 5?" \
  "What is the opposite of hot?" \
  "How many minutes are in an hour?" \
  "Which planet is closest to the Sun?"; do
  printf 'Q: %s\n' "$question"
  printf 'A: %s\n' "$(mlcawq chat "$out/built" --prompt "$question" --temperature 0 2>"$out/chat.log" || {
    cat "$out/chat.log" >&2
    exit 1
  })"
done

step "mlcawq eval: held-back wordings, the 4-bit library beside the fp16 checkpoint in PyTorch"
mlcawq eval "$out/built" --questions demo/questions.jsonl --against "$model"

cat >&2 <<TEXT

Talk to it yourself:
  . ${venv#"$PWD"/}/bin/activate && mlcawq chat ${out#"$PWD"/}/built
TEXT
