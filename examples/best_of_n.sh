#!/usr/bin/env bash
# Samples sixteen answers, lets the reward model score them, and returns the best.
set -euo pipefail
curl -sS --fail-with-body "${EURUS_URL:-http://127.0.0.1:8000}/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Use the numbers 3, 5, 8 to make 29."}],
  "max_tokens": 128,
  "temperature": 1,
  "seed": 1,
  "best_of": 16,
  "rerank": {"strategy": "reward"}
}'
echo
