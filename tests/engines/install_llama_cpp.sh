#!/usr/bin/env bash
# llama.cpp's sources with its llama-server and llama-quantize, for `finetune export --to gguf` and for the tests that ask
# the real engine:
#
#   tests/engines/install_llama_cpp.sh /opt/llama.cpp
#   FINETUNE_LLAMA_CPP=/opt/llama.cpp .venv/bin/python -m pytest -m engines tests/engines/test_llama_cpp_engine.py
#
# Needs a C++ compiler and a python with pip. CMAKE_ARGS, as -DGGML_CUDA=ON, go to cmake; JOBS: how much is built at once.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER (new, of llama.cpp)" >&2; exit 2; }
[ ! -e "$1" ] || { echo "$1 is there already" >&2; exit 2; }
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The sources come along with llama.cpp's Python bindings: a package registry is all that is needed. Only unpacked.
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$scratch" llama-cpp-python==0.3.36
tar -xzf "$scratch"/*.tar.gz -C "$scratch"
mkdir -p "$(dirname "$1")"
mv "$scratch"/*/vendor/llama.cpp "$1"

# cmake and ninja come from the registry too, for this build alone.
"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet cmake ninja
PATH="$scratch/tools/bin:$PATH"
# shellcheck disable=SC2086
cmake -S "$1" -B "$1/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF ${CMAKE_ARGS:-} >"$scratch/cmake.log" ||
  { tail -20 "$scratch/cmake.log" >&2; exit 1; }
cmake --build "$1/build" --target llama-server llama-quantize -j "${JOBS:-$(nproc)}"
"$1/build/bin/llama-server" --version
