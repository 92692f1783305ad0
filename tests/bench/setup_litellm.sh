#!/bin/sh
# Build the environment of LiteLLM's proxy, which the gateway is measured beside: .venv-litellm, by hash.
# About a hundred packages, 250 MB on disk. Safe to run twice.
set -eu
cd "$(dirname "$0")/../.."
lock=tests/bench/litellm-py311.txt
python=${LITELLM_PYTHON:-.venv/bin/python}
if cmp -s "$lock" .venv-litellm/lock; then
    echo "setup_litellm: .venv-litellm is there"
    exit 0
fi
[ -x "$python" ] || { echo "setup_litellm: no $python: \`make setup\` first, or LITELLM_PYTHON=/path/to/python3.11" >&2; exit 1; }
rm -rf .venv-litellm
"$python" -m venv .venv-litellm
.venv-litellm/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --only-binary=:all: --require-hashes -r "$lock"
cp "$lock" .venv-litellm/lock
echo "setup_litellm: .venv-litellm is ready"
