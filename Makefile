# One command each; `make help` lists them. Needs Python >= 3.11, make and git, nothing else.
# Every environment is built on first use and again when pyproject.toml changes.

runs     = $(shell for python in $(1); do $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PYTHON  ?= $(call runs,python3.11 python3 python)
WORKERS ?= 2

# A python3.12 on the path may be a version manager's shim that refuses to run: then ask pyenv which 3.12 it has.
where      = python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null
PYTHON312 ?= $(shell $(where) || PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -n 1)" $(where))

BIN    := .venv/bin
LATEST := .venv-latest/bin
PYTEST  = python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL: # two installations into one environment must not meet
.PHONY: help demo examples test test-latest lint types format bench python312 clean

help: ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: .venv/.examples ## train a small language model, then stream from it in memory that does not grow
	$(BIN)/python examples/stream_forever.py

examples: .venv/.examples ## run every other example
	@set -e; for file in $(filter-out examples/stream_forever.py,$(wildcard examples/[a-z]*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file; done

test: .venv/.dev ## run every test
	$(BIN)/$(PYTEST) $(ARGS)

test-latest: .venv-latest/.test ## run the JAX tests on Python 3.12 with the newest jax allowed, without torch
	$(LATEST)/$(PYTEST) $(ARGS)

lint: .venv/.dev ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## mypy
	$(BIN)/mypy

format: .venv/.dev ## rewrite to ruff's layout, mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev ## time it against its peers on this machine's CPU
	$(BIN)/python -m benchmarks $(ARGS)

python312: # print a Python 3.12 that runs, or nothing
	@echo $(PYTHON312)

clean: ## remove the environments and everything else that is built here
	rm -rf .venv .venv-latest .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments: .venv/.dev is "the extra `dev` is installed in .venv".
.venv/.%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: name one, make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing ringjax[$*] into .venv: minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

.venv-latest/.%: pyproject.toml
	@test -n "$(PYTHON312)" || { echo "No Python 3.12 found: name one, make $(MAKECMDGOALS) PYTHON312=/path/to/python3.12"; exit 1; }
	@echo "Installing ringjax[$*] into .venv-latest: minutes the first time"
	@test -x $(LATEST)/python || $(PYTHON312) -m venv .venv-latest
	$(LATEST)/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[$*]'
	@touch $@
