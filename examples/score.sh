#!/usr/bin/env bash
# Rewards of two answers to one question: the first is right, the second is not.
set -euo pipefail
curl -sS --fail-with-body "${EURUS_URL:-http://127.0.0.1:8000}/v1/rewards" -H 'Content-Type: application/json' -d '{
  "prompt": [{"role": "user", "content": "Use the numbers 3, 5, 8 to make 29."}],
  "completions": [
    "Step 1: 8*3=24, left 5 24\nStep 2: 24+5=29, left 29\nAnswer: \\boxed{8*3+5}",
    "Step 1: 8*3=24, left 5 24\nStep 2: 24-5=19, left 19\nAnswer: \\boxed{8*3-5}"
  ]
}'
echo
