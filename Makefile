# The package index is the only thing reached: `make demo` and `make test` start from Python and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make INSTALL_FLAGS=` shows what pip does.
INSTALL_FLAGS ?= --quiet --disable-pip-version-check

PYTHON_STAMP := $(VENV)/.stamp-python
RUNTIME_STAMP := $(VENV)/.stamp-runtime
TEST_STAMP := $(VENV)/.stamp-test
# llm-compressor, which benchmarks/quality.py compares with, wants other versions than we do
BENCH_VENV := .venv-bench
BENCH_PEER := llmcompressor==0.14.0.1
# SGLang pins other versions of transformers and compressed-tensors than ours
SGLANG_VENV := .venv-sglang
SGLANG := sglang==0.5.15.post1
SGLANG_STAMP := $(SGLANG_VENV)/.stamp-$(SGLANG)
BENCH_STAMP := $(BENCH_VENV)/.stamp-$(BENCH_PEER)

# `make PYTEST_WORKERS=0 test` runs all in one process
PYTEST_WORKERS ?= logical
# begun in the order of tests/conftest.py: what takes longest first
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup --no-loadscope-reorder

export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo up down test test-ops test-all test-long ops-packages lint bench-env sglang-env clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(TEST_STAMP) ## make .venv with the test extra

demo: $(RUNTIME_STAMP) ## quantize the demo model and show what it costs
	@$(BIN)/blockquant demo

up: $(RUNTIME_STAMP) ## start Prefect, MLflow and a worker on this machine, and print where they are
	@$(BIN)/python -m flows.local_services up

down: $(RUNTIME_STAMP) ## end what `make up` started
	@$(BIN)/python -m flows.local_services down

test: $(TEST_STAMP) ## all tests but the long operations tests
	@$(PYTEST) -m 'not ops and not long'

test-ops: $(TEST_STAMP) ## long operations tests: kills, databases, browsers, clusters
	@$(PYTEST) -m 'ops and not long' --durations=25

test-all: $(TEST_STAMP) ## both: what is run for every change
	@$(PYTEST) -m 'not long' --durations=25

test-long: $(TEST_STAMP) ## more kills, and quality on more text, than a check of every change has time for
	@$(PYTEST) -m long --durations=25 -rP

lint: $(TEST_STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers auto
	$(BIN)/lint-imports

# The tests say what is missing; installing needs root and Debian's apt-get.
OPS_PACKAGES := postgresql chromium chromium-driver
ops-packages: ## install what test-ops needs of Debian: PostgreSQL and a browser
	@missing=; for name in $(OPS_PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q ' installed$$' || missing="$$missing $$name"; done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "make: test-ops needs$$missing, which are not installed; install them" >&2; exit 1; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -qq --no-install-recommends $$missing >/dev/null

sglang-env: $(SGLANG_STAMP) ## make .venv-sglang with SGLang, where there is a GPU

bench-env: $(BENCH_STAMP) ## make .venv-bench with llm-compressor

clean: ## remove .venv, build leftovers and the tools' caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find flows tasks quantizers configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is taken up again by the next make.
$(PYTHON_STAMP):
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: $(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $$($(PYTHON) --version) is too old: blockquant needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME_STAMP): pyproject.toml constraints.txt | $(PYTHON_STAMP)
	@echo "Installing blockquant into $(VENV): about 2 GB and some minutes the first time (no progress is shown)."
	$(BIN)/python -m pip install $(INSTALL_FLAGS) -c constraints.txt -e .
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(PYTHON_STAMP)
	@echo "Installing blockquant and its tests' needs into $(VENV): about 3 GB and some minutes the first time."
	$(BIN)/python -m pip install $(INSTALL_FLAGS) -c constraints.txt -e '.[test]'
	@touch $(RUNTIME_STAMP) $@

$(BENCH_STAMP):
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install $(INSTALL_FLAGS) '$(BENCH_PEER)'
	@touch $@

$(SGLANG_STAMP):
	@command -v nvidia-smi >/dev/null || { \
		echo "make: no NVIDIA GPU here (nvidia-smi not found), which SGLang needs; use a machine that has one" >&2; exit 1; }
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install $(INSTALL_FLAGS) '$(SGLANG)'
	@touch $@
