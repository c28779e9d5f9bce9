#!/usr/bin/env bash
# One streamed answer of the policy, token by token.
set -euo pipefail
curl -sSN --fail-with-body "${EURUS_URL:-http://127.0.0.1:8000}/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Use the numbers 3, 5, 8 to make 29."}],
  "max_tokens": 128,
  "temperature": 0,
  "stream": true,
  "stream_options": {"include_usage": true}
}'
