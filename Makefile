# One command each; `make help` lists them. Needs Python >= 3.11, make and git, nothing else.
# Every environment is built on first use and again when pyproject.toml changes.

runs     = $(shell for python in $(1); do $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PYTHON  ?= $(call runs,python3.11 python3 python)
WORKERS ?= 2

# A python3.12 on the path may be a version manager's shim that refuses to run: then ask pyenv which 3.12 it has.
where      = python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null
PYTHON312 ?= $(shell $(where) || PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -n 1)" $(where))

# xFormers' registries of components: a release without a wheel for Python 3.13 and newer.
old           = for python in $(PYTHON) $(PYTHON312); do $$python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' && echo $$python && break; done
LEGACY_PYTHON ?= $(shell $(old))

BIN    := .venv/bin
LATEST := .venv-latest/bin
LEGACY := .venv-legacy/bin
AOT    := .venv-aot/bin
PYTEST  = python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL: # two installations into one environment must not meet
.PHONY: help demo examples test test-latest test-legacy lint types format bench aot python312 legacy-python clean

help: ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: .venv/.examples ## train a small language model, then stream from it in memory that does not grow
	$(BIN)/python examples/stream_forever.py

examples: .venv/.dev ## run every other example
	@set -e; for file in $(filter-out examples/stream_forever.py,$(wildcard examples/[a-z]*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file; done

test: .venv/.dev ## run every test
	$(BIN)/$(PYTEST) $(ARGS)

test-latest: .venv-latest/.test ## run the JAX tests on Python 3.12 with the newest jax allowed, without torch
	$(LATEST)/$(PYTEST) $(ARGS)

test-legacy: .venv-legacy/.xformers ## run the tests of xFormers beside the last one that has a registry of components
	$(LEGACY)/$(PYTEST) tests/bridge/test_legacy.py $(wildcard tests/bridge/test_xformers*.py) $(ARGS)

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

aot: .venv-aot/.cuda ## compile every Hopper kernel for an H200, without one; fails if a kernel spills registers (4.4 GB)
	$(AOT)/python -m benchmarks.gpu_compile $(ARGS)

python312: # print a Python 3.12 that runs, or nothing
	@echo $(PYTHON312)

legacy-python: # print a Python that the old xFormers has a wheel for, or nothing
	@echo $(LEGACY_PYTHON)

clean: ## remove the environments and everything else that is built here
	rm -rf .venv .venv-latest .venv-legacy .venv-aot .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist out
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

# That xFormers asks for torch 2.5.1, and runs beside any other: no extra can say so. It has no wheel past Python 3.12.
.venv-legacy/.xformers: pyproject.toml
	@test -n "$(LEGACY_PYTHON)" || { echo "No Python 3.11 or 3.12 found: name one, make test-legacy LEGACY_PYTHON=/path/to/python"; exit 1; }
	@echo "Installing ringjax[test], torch and an old xformers into .venv-legacy: minutes the first time"
	@test -x $(LEGACY)/python || $(LEGACY_PYTHON) -m venv .venv-legacy
	$(LEGACY)/python -m pip install -qq --disable-pip-version-check --editable '.[test]' torch==2.13.0
	$(LEGACY)/python -m pip install -qq --disable-pip-version-check --no-deps xformers==0.0.28.post3
	@touch $@

# The kernels are compiled by the one jax whose ptxas their sizes were chosen with: 0.12 assembles them by another library
# (nvJitLink), which spills where this one does not.
.venv-aot/.%: pyproject.toml
	@test -n "$(PYTHON312)" || { echo "No Python 3.12 found: name one, make aot PYTHON312=/path/to/python3.12"; exit 1; }
	@echo "Installing ringjax[$*] with jax 0.11.2 into .venv-aot: minutes and 4.4 GB the first time"
	@test -x $(AOT)/python || $(PYTHON312) -m venv .venv-aot
	$(AOT)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]' jax==0.11.2 jaxlib==0.11.2
	@touch $@
