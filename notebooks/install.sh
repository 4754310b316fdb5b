#!/usr/bin/env bash
# Puts the kit into Colab's environment, and changes no package that a running kernel has imported.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

"$python" -m pip uninstall --quiet --yes torchao # PEFT refuses Colab's version
"$python" -m pip install --quiet --no-deps --requirement notebooks/colab-lock.txt
"$python" -m pip install --quiet --no-deps .
