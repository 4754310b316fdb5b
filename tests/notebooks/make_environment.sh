#!/usr/bin/env bash
# An environment with Colab's versions, as before a notebook's first cell, but with the CPU build of torch and the Python
# that is here: `make_environment.sh FOLDER`. Takes minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

"${PYTHON:-python3}" -m venv "$1"
# Colab's torch is a build for CUDA.
grep -vE '^(#|torch|torchvision|torchao|nvidia-(nccl|nvshmem|cu)|cuda-)' notebooks/colab-versions.txt >"$1/colab.txt"
"$1/bin/python" -m pip install --quiet torch==2.13.0
"$1/bin/python" -m pip install --quiet --no-deps torchao==0.10.0 --requirement "$1/colab.txt"
"$1/bin/python" -m pip install --quiet nbclient nbformat ipykernel httpx==0.28.1 --constraint "$1/colab.txt"
