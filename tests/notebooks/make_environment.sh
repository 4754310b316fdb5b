#!/usr/bin/env bash
# An environment with Colab's versions, as before a notebook's first cell, but with the Python and the torch that another
# environment has: `make_environment.sh FOLDER OTHER`. torch is linked, not copied: it is by far the largest package.
set -euo pipefail
cd "$(dirname "$0")/../.."

"$2/bin/python" -m venv "$1"
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
other=$(realpath "$(packages "$2")")
ln -s "$other"/torch "$other"/torch-*.dist-info "$other"/torchgen "$other"/functorch "$(packages "$1")"
# Colab's torch is a build for CUDA; what belongs to that isn't needed.
grep -vE '^(#|torch(vision)?=|triton=|nvidia-nccl|cuda-)' notebooks/colab-versions.txt >"$1/colab.txt"
pip=("$1/bin/python" -m pip --quiet --disable-pip-version-check install --no-compile)
"${pip[@]}" --no-deps --requirement "$1/colab.txt"
"${pip[@]}" nbclient nbformat ipykernel httpx==0.28.1 --constraint "$1/colab.txt"
