#!/usr/bin/env bash
# Checks the server with the clients that people use: openai-python and lm-evaluation-harness.
# The packages are installed once into .venv-clients; the server runs the built-in models on a free port.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${EURUS_CLIENTS_VENV:-.venv-clients}
if [[ ! -x $venv/bin/lm_eval ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet 'openai>=2,<4' 'lm-eval[api]==0.4.13'
fi

# As `cargo test` builds it, so that nothing is built twice.
cargo test --locked --no-run --quiet
binary=${CARGO_TARGET_DIR:-target}/debug/eurus
log=$(mktemp)
"$binary" serve --port 0 --log-format json 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT

url=
for _ in $(seq 300); do
    url=$(sed -n 's/.*"message":"listening on \(http[^"]*\)".*/\1/p' "$log")
    [[ -n $url ]] && break
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
done
[[ -n $url ]] || { echo "the server did not start:" >&2; cat "$log" >&2; exit 1; }

export EURUS_URL=$url
"$venv/bin/python" tests/clients/openai_client.py
"$venv/bin/python" tests/clients/lm_eval_check.py
echo "clients: all passed"
