#!/usr/bin/env bash
# Everything that kernels/README.md leaves open, on a machine with a GPU, in about ten minutes: tests, single operations beside PyTorch,
# a Mistral of 7 billion random parameters, a server under load, memory checks. Run it in the folder that `make device-bundle` leaves;
# results go to the folder in $1, each part to a file of its own, so what is cut short leaves the parts before it.
set -uo pipefail
cd "$(dirname "$0")"
out=${1:-results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT

# cuBLAS and cuRAND of the toolkit, or of the wheels that PyTorch brings.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)/nvidia/cu13/lib; do
    [[ -d $folder ]] && export LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-}
done

# part NAME SECONDS COMMAND..
part() {
    local name=$1 seconds=$2 started=$SECONDS status=0
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1 || status=$?
    printf '%-18s status %3d, %4d s\n' "$name" "$status" $((SECONDS - started)) | tee -a "$out/summary.txt"
}

{ date -u; cat commit; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; } 2>&1 | tee "$out/summary.txt"
part check 30 ./eurus check --device cuda
part tests 150 ./device-tests --nocapture
part kernels 120 ./eurus bench kernels --device cuda
part torch 90 python3 torch_baseline.py
seven=(--hidden 4096 --layers 32 --heads 32 --kv-heads 8 --intermediate 14336 --positions 32768)
part make-policy 120 ./eurus bench make-model "$work/policy" "${seven[@]}"
part model-1k 150 ./eurus bench model --device cuda --model "$work/policy" --prefill 2048 --context 1024 --batches 1,8,32,128
part model-1k-launched 90 ./eurus bench model --device cuda --model "$work/policy" --prefill 64 --context 1024 --batches 1,8 --no-step-graphs
part model-4k 150 ./eurus bench model --device cuda --model "$work/policy" --prefill 2048 --context 4096 --batches 1,8,32,128

# One server with both heads: 64 streams, then 64 answers of 512 tokens that share a prompt.
part make-reward 120 ./eurus bench make-model "$work/reward" "${seven[@]}" --kind reward
started=$SECONDS
export EURUS_SERVER__PORT=8123
./eurus serve --device cuda --model "$work/policy" --reward-model "$work/reward" \
    --set engine.step_tokens=4096 >"$out/serve.txt" 2>&1 &
until ./eurus health >/dev/null 2>&1; do
    jobs -r %% >/dev/null 2>&1 || break
    sleep 0.2
done
echo "the server was ready after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
part stream-64 90 ./eurus bench serve --url http://127.0.0.1:8123 --concurrency 64 --requests 256 --prompt-tokens 256 --output-tokens 128
part score-64 60 ./eurus bench serve --url http://127.0.0.1:8123 --work reward --concurrency 64 --requests 64 \
    --prompt-tokens 768 --shared-prefix 256
kill %% 2>/dev/null

if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    part memcheck 120 "$sanitizer" --tool memcheck ./device-tests ops:: replays:: --test-threads 1
    part racecheck 120 "$sanitizer" --tool racecheck ./device-tests ops:: replays:: --test-threads 1
else
    echo 'no compute-sanitizer here' | tee -a "$out/summary.txt"
fi
