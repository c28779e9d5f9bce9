#!/usr/bin/env bash
# Runs the kernels in the emulator under the address sanitiser: it names the kernel's file and line where memory is overrun.
# The sanitiser must be in the process before the libraries that use it. Fibers leave their stacks without returning.
set -euo pipefail
cd "$(dirname "$0")/../.."

export EURUS_EMULATOR_FLAGS=-fsanitize=address
binary=$(cargo test --features emulator --test kernels --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\/kernels-[^"]*\)".*/\1/p')
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0
LD_PRELOAD=$(g++ -print-file-name=libasan.so) "$binary" "$@"
