#!/usr/bin/env bash
# Runs the kernels in the emulator under the address sanitiser: it names the kernel's file and line where memory is overrun.
# The sanitiser must be in the process before the libraries that use it. Fibers leave their stacks without returning.
set -euo pipefail
cd "$(dirname "$0")/../.."

export EURUS_EMULATOR_FLAGS=-fsanitize=address
binary=$(cargo test --features emulator --test kernels --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\/kernels-[^"]*\)".*/\1/p')
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0
LD_PRELOAD=$(g++ -print-file-name=libasan.so)
export LD_PRELOAD
# A kernel that reads too far must be noticed, or a clean run says nothing.
probe=emulator::divergence_is_refused_with_the_place
if found=$(EURUS_PROBE=overrun "$binary" --exact $probe 2>&1) || [[ $found != *heap-buffer-overflow*probes.cu* ]]; then
    printf 'the address sanitiser does not see an overrun:\n%s\n' "$found" >&2
    exit 1
fi
"$binary" "$@"
