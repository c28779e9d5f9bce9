# Names commands, holds no logic. `make` lists them.
.PHONY: help build test ci clients serve health fmt lint doc bench bon-curve mini image cuda-toolchain kernels emulator \
	planted-bugs sanitize-kernels device-tests device-bundle

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

build: ## release binary at target/release/eurus
	cargo build --release
test: ## all tests, no network
	cargo test
ci: ## what a change must pass
	.ci/run
clients: ## the Python clients against a development build
	.ci/clients.sh
serve: ## the built-in models on http://127.0.0.1:8000
	cargo run --release -- serve
health: ## asks the server on this machine
	cargo run --release -- health
fmt: ## formats the sources
	cargo fmt
lint: ## clippy, warnings denied
	cargo clippy --all-targets -- -D warnings
doc: ## the library's documentation, warnings denied
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
bench: ## micro-benchmarks of the operations
	cargo bench
bon-curve: ## accuracy of best-of-n on the held-out problems of eurus-mini
	cargo run --release -- bench bon-curve
mini: ## the miniature study: trees, policy, reward models, preference learning, best-of-n; hours
	cargo build --release
	training/mini.sh
cuda-toolchain: ## the CUDA 13.0 compiler, from wheels, in .cuda
	kernels/toolchain.sh
kernels: cuda-toolchain ## compiles the kernels for GPUs, runs them in the emulator, checks what the compiler made of them
	cargo test --features cuda,emulator --test kernels
emulator: ## the kernels in the emulator alone: needs g++, no CUDA
	cargo test --features emulator --test kernels
planted-bugs: ## kernels with errors planted in them: how many random shapes notice
	cargo test --features emulator --test kernels planted -- --nocapture
sanitize-kernels: ## the kernels in the emulator under the address sanitiser
	kernels/emulator/sanitize.sh
device-tests: cuda-toolchain ## the server's way to a GPU, on the emulator; EURUS_TEST_DEVICE=cuda takes a GPU
	cargo test --features cuda,emulator --test device
device-bundle: cuda-toolchain ## binary, device tests and a script for a machine that has a GPU and nothing to build with
	kernels/bundle.sh
image: ## container image for CPUs
	docker build -t eurus .
