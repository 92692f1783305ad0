#!/bin/sh
# Build the environment in which NVIDIA's own verifier runs: .venv-nvidia beside .venv, Python 3.11 or 3.12 (lxml 4.9
# has no wheel for 3.13). Its pins conflict with ours, so it never shares an environment with vouchsafe.
# About 55 packages, 125 MB. Safe to run twice.
set -eu
cd "$(dirname "$0")/../.."
python=${NVIDIA_PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12; do
        if command -v "$candidate" >/dev/null 2>&1; then python=$candidate; break; fi
    done
fi
[ -n "$python" ] || { echo "setup_nvidia: needs python3.11 or python3.12 (or NVIDIA_PYTHON=...)" >&2; exit 1; }
if .venv-nvidia/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("nv-attestation-sdk") != "2.7.3")' 2>/dev/null; then
    echo "setup_nvidia: .venv-nvidia is there"
    exit 0
fi
rm -rf .venv-nvidia
"$python" -m venv .venv-nvidia
.venv-nvidia/bin/python -m pip install --quiet --disable-pip-version-check -r tests/interop/nvidia-requirements.txt
echo "setup_nvidia: .venv-nvidia is ready"
