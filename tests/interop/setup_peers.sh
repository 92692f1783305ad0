#!/bin/sh
# Build the environment of the implementations that read our formats: .venv-peers beside .venv, by hash.
# Six packages, 38 MB to fetch, 125 MB on disk. Safe to run twice.
set -eu
cd "$(dirname "$0")/../.."
lock=tests/interop/peers-py311.txt
python=${PEERS_PYTHON:-.venv/bin/python}
if cmp -s "$lock" .venv-peers/lock; then
    echo "setup_peers: .venv-peers is there"
    exit 0
fi
[ -x "$python" ] || { echo "setup_peers: no $python: \`make setup\` first, or PEERS_PYTHON=/path/to/python3.11" >&2; exit 1; }
rm -rf .venv-peers
"$python" -m venv .venv-peers
.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --only-binary=:all: --require-hashes -r "$lock"
cp "$lock" .venv-peers/lock
echo "setup_peers: .venv-peers is ready"
