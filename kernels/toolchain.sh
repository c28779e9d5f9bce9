#!/usr/bin/env bash
# Installs the CUDA 13.0 compiler from pinned wheels into .cuda (105 MB to fetch, 300 MB on disk). Needs python3 and, to compile, g++.
# CUDA 13.0 because a driver refuses PTX that is newer than itself. The disassemblers exist as wheels from 13.2 on and read 13.0 files.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-cuobjdump==13.2.51
    nvidia-cuda-nvdisasm==13.2.51
)
wanted=$(printf '%s\n' "${packages[@]}")
if [[ -f .cuda/packages && $(<.cuda/packages) == "$wanted" && -e .cuda/toolkit ]]; then
    exit 0
fi
rm -rf .cuda
python3 -m venv .cuda
.cuda/bin/pip install --quiet --disable-pip-version-check --no-deps "${packages[@]}"
home=$(echo .cuda/lib/python3*/site-packages/nvidia/cu13)
[[ -x $home/bin/nvcc ]] || { echo "the wheels have no $home/bin/nvcc" >&2; exit 1; }
# nvcc looks for its libraries in lib64; the wheels have lib.
ln -sfn lib "$home/lib64"
# One path whatever python3 there is: .cargo/config.toml names it.
ln -sfn "${home#.cuda/}" .cuda/toolkit
printf '%s\n' "$wanted" > .cuda/packages
