#!/usr/bin/env bash
# Packs what a machine with a GPU needs to test and measure this program without building it: the binary, the device tests and
# kernels/device_run.sh. It needs the driver of CUDA 13, cuBLAS and cuRAND. Leaves target/device-bundle and the same as .tar.xz.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --locked --features cuda --bin eurus
tests=$(cargo test --locked --features cuda --test device --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\/device-[^"]*\)".*/\1/p')
target=${CARGO_TARGET_DIR:-target}
bundle=$target/device-bundle
rm -rf "$bundle"
mkdir -p "$bundle/tests/fixtures"
strip -o "$bundle/eurus" "$target/release/eurus"
strip -o "$bundle/device-tests" "$tests"
cp -r tests/fixtures/serve "$bundle/tests/fixtures/"
cp kernels/device_run.sh kernels/torch_baseline.py "$bundle/"
git rev-parse HEAD > "$bundle/commit"
tar -C "$target" -cJf "$bundle.tar.xz" device-bundle
du -h "$bundle.tar.xz"
