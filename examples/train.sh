#!/usr/bin/env bash
# Trains the built-in policy for a few steps on the preference pairs beside this script and prints the last metrics.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
output="${1:-runs/example-dpo}"
"${EURUS:-eurus}" train dpo --config "$here/train.toml" --set "data.source.0.path=$here/pairs.jsonl" --set "run.output=$output"
tail -n 1 "$output/metrics.jsonl"
