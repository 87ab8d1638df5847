#!/usr/bin/env bash
# The planner against a real CUDA card, on a machine without internet. Not run yet: no such machine was at hand.
#
#   scripts/gpu_check.sh [BUDGET_GIB]      default 24
#
# Needs: the NVIDIA driver, a CUDA toolkit with nvcc (or wheels/ beside this checkout with llama-cpp-python built for CUDA),
# Python 3.10 or newer, and pip's files of the dependencies in wheels/ when there is no index.
# It installs into .venv-gpu, plans QwQ's full geometry for a card of which BUDGET_GIB are left free (a ballast takes the rest),
# loads it from a sparse file, fills 32,768 tokens and decodes; the last line is JSON: plan, memory as nvidia-smi sees it, speed.
set -eu
cd "$(dirname "$0")/.."
budget="${1:-24}"
python="${PYTHON:-python3}"
[ -d .venv-gpu ] || "$python" -m venv .venv-gpu
wheels=(--find-links wheels)
[ -d wheels ] || wheels=()
CMAKE_ARGS="-DGGML_CUDA=on" .venv-gpu/bin/pip install --quiet "${wheels[@]}" -e .
.venv-gpu/bin/qwq-lite doctor
.venv-gpu/bin/qwq-lite plan qwq-32b-preview --memory "${budget}GiB"
.venv-gpu/bin/python scripts/gpu_check.py --memory "$budget"
