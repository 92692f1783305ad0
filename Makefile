# vouchsafe: `make help` lists what there is. Only `system` needs root.
SHELL := /bin/bash
PYTHON ?= python3.11
PY := .venv/bin/python
MODEL ?=
VOUCHSAFE_VECTORS ?=
export VOUCHSAFE_VECTORS

# Without the variable, an absent folder makes the vector tests skip out loud; with it, it must be there.
ifeq ($(VOUCHSAFE_VECTORS),)
unexport VOUCHSAFE_VECTORS
endif

.PHONY: help system setup clients demo run test check format bench fuzz interop ci-long lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

system: ## Debian packages that other targets need (root)
	@if [ "$$(id -u)" != 0 ]; then echo "error: make system needs root"; echo "hint: sudo make system"; exit 1; fi
	DEBIAN_FRONTEND=noninteractive apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv python3-dev gcc g++ make git openssl curl
	@# Tests start PostgreSQL servers of their own: Debian's package is told to make and start no cluster.
	@d=/etc/postgresql-common/createcluster.d; mkdir -p $$d && echo "create_main_cluster = false" > $$d/vouchsafe.conf; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql; s=$$?; rm -f $$d/vouchsafe.conf; exit $$s

setup: ## .venv with everything the other targets need (no root; TORCH_INDEX=URL where pip finds no CPU build of torch)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON)"; echo "hint: \`make system\` as root, or make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) images/locks/setup.py

clients: setup ## .venv-clients: LangChain, LiteLLM and Node.js for the examples under docs/ (about 30 s)
	@$(PYTHON) images/locks/setup_clients.py

demo: setup ## the whole path: verify, chat, receipt, what the host saw, three refusals (MODEL=DIR for your own model)
	@$(PY) -m tests.demo $(if $(MODEL),--model $(MODEL))

run: setup ## the same, and keep serving
	@$(PY) -m tests.demo --keep $(if $(MODEL),--model $(MODEL))

test: setup clients ## all tests that need no special hardware
	$(PY) -m pytest -q $(TESTS)

ci-long: bench fuzz interop ## everything that takes longer than CI has

check: setup ## format, lint, types, import contracts
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: setup ## let ruff put the code in shape
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

interop: setup ## our formats read by implementations from elsewhere, the gateway under suites from elsewhere, in environments of their own
	sh tests/interop/setup_nvidia.sh
	sh tests/interop/setup_peers.sh
	sh tests/interop/setup_suites.sh
	$(PY) -m pytest -q tests/interop

bench: setup ## ratios against peers in one run, build/bench.json
	sh tests/bench/setup_litellm.sh
	$(PY) -m tests.bench

fuzz: setup ## every byte of real evidence changed once, then coverage-guided fuzzing of every parser (SECONDS=60 each)
	VOUCHSAFE_SWEEP=all $(PY) -m pytest -q --timeout 3600 tests/attestation/tdx/test_sweep.py tests/attestation/gpu
	$(PY) -m tests.fuzz --seconds $(or $(SECONDS),60)

lock: setup ## refresh the locks from their .in files, showing what changed
	$(PY) images/locks/lock.py images/locks/cpu-py311.in
	$(PY) images/locks/lock.py images/locks/clients-py311.in

clean: ## what the targets made, .venv included
	rm -rf .venv .venv-nvidia .venv-peers .venv-clients .venv-suites .venv-litellm build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
