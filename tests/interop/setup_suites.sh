#!/bin/sh
# Build .venv-suites by hash: schemathesis, and what OpenAI's own API tests need; and unpack those tests, which come with
# the source distribution of OpenAI's SDK. Sixty packages, 100 MB on disk. Safe to run twice.
set -eu
cd "$(dirname "$0")/../.."
lock=tests/interop/suites-py311.txt
python=${SUITES_PYTHON:-.venv/bin/python}
if cmp -s "$lock" .venv-suites/lock && [ -d .venv-suites/openai-python ]; then
    echo "setup_suites: .venv-suites is there"
    exit 0
fi
[ -x "$python" ] || { echo "setup_suites: no $python: \`make setup\` first, or SUITES_PYTHON=/path/to/python3.11" >&2; exit 1; }
rm -rf .venv-suites
"$python" -m venv .venv-suites
.venv-suites/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --only-binary=:all: --require-hashes -r "$lock"
# pip wants to see a source's metadata before it hands it over: .venv has the build backend that makes it.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary=:all: --no-build-isolation \
    --require-hashes -r tests/interop/suites-source.txt -d .venv-suites/source
mkdir .venv-suites/openai-python
tar xzf .venv-suites/source/openai-*.tar.gz -C .venv-suites/openai-python --strip-components 1
cp "$lock" .venv-suites/lock
echo "setup_suites: .venv-suites is ready"
