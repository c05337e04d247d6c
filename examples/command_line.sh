#!/usr/bin/env bash
# The whole workflow on the command line: train two adapters, merge them, score the result, predict.
# Usage: examples/command_line.sh [BASE]      (BASE: minilm, a folder, or a name on the Hub)
set -euo pipefail
base="${1:-minilm}"
cd "$(mktemp -d)"

mbert train-adapter --task sst --data sample --base "$base" --epochs 1
mbert train-adapter --task sts --data sample --base "$base" --epochs 1
mbert merge --method orthoada --out merged.safetensors
mbert eval merged.safetensors --data sample --json scores.json --markdown scores.md
mbert predict merged.safetensors --task sts "A cat sleeps." "A kitten naps."
printf 'sentence\nA truly good film.\nThe plot was awful.\n' | mbert predict merged.safetensors --task sst
mbert inspect merged.safetensors
mbert merge --method ensemble --out ensemble.safetensors --dense folders
echo "results in $PWD"
