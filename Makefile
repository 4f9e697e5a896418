# Everything works on a fresh clone with make and Python >= 3.11: the first target that needs it makes .venv and installs
# the versions of constraints.txt; later calls reuse it until pyproject.toml or constraints.txt change.
#   make setup PYTHON=/path/to/python3.12
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu     the CPU build of torch, where PyPI holds the CUDA one
#   make test PYTEST_ARGS="-n 2 -k bmr"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that runs, is new enough and can make a virtual environment.
CAN_BUILD := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c "$(CAN_BUILD)" >/dev/null 2>&1 && echo $$p && break; done)

TORCH_INDEX ?=
PYTEST_ARGS ?=
DATA ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow lint format bench clean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## make .venv and install pyrobc with all extras, at the tested versions

# torch goes first and alone, so that TORCH_INDEX governs nothing else.  The stamp is written last: an install that was
# killed is finished by the next call, and an environment without a working pip is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/pip --version >/dev/null 2>&1 || test -n "$(PYTHON)" || \
	  { echo "make: Python: found none that fits; allowed: >= 3.11 with venv; fix: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -f $@
	@$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: $(STAMP)  ## compress a network on real data, from fit to report
	$(BIN)/pyrobc demo

test: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and mypy, nothing is changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## run every benchmark; results go to benchmarks/results (MNIST's with DATA=folder, hours)
	$(BIN)/python -m benchmarks --all $(if $(DATA),--data $(DATA))

clean:  ## remove build outputs and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
