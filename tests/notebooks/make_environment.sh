#!/usr/bin/env bash
# An environment with Colab's versions, but the CPU build of torch; `make_environment.sh FOLDER`, minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

python3 -m venv "$1"
torch=${TORCH:-torch==2.13.0}
grep --extended-regexp --invert-match '^(#|torch|nvidia-(nccl|nvshmem|cu)|cuda-)' notebooks/colab-versions.txt >"$1/colab.txt"
"$1/bin/python" -m pip install --quiet "$torch"
"$1/bin/python" -m pip install --quiet --no-deps --requirement "$1/colab.txt" torchao==0.10.0
"$1/bin/python" -m pip install --quiet nbclient nbformat ipykernel --constraint "$1/colab.txt"
notebooks/install.sh "$1/bin/python"
