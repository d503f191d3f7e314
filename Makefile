# Everything runs in .venv, which is made on first use. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TEST_PROCESSES ?= 2
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo check test test-all build clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A driver shows itself in /proc; under WSL it is the host's, behind /dev/dxg, and brings nvidia-smi along.
HAS_NVIDIA := $(shell [ -e /proc/driver/nvidia/version ] || { [ -e /dev/dxg ] && command -v nvidia-smi; } >/dev/null && echo yes)

# Without an NVIDIA driver a plain torch would bring gigabytes of CUDA: take a CPU build that is at hand
# (PIP_FIND_LINKS), else one of PyTorch's public CPU wheels.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dsft needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ -z "$(HAS_NVIDIA)" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  $(BIN)/pip install -q --no-index --no-deps $(TORCH) 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps --index-url $(CPU_WHEELS) $(TORCH); fi
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready ## fine-tune the embedded tiny model and ask it something
	$(BIN)/dsft train --preset tiny --overwrite
	$(BIN)/dsft infer "Write a Python function times_four(n) that returns n times 4." --model ./trained_tiny

check: $(VENV)/.ready ## lint, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each process takes a part of the tests in their order, so that a file's fixtures are mostly made once.
test: check ## check and the fast tests: what CI runs
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-all: check ## the long tests too
	$(BIN)/python -m pytest -m "not gpu or gpu"

build: $(VENV)/.ready ## wheel and source distribution in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what the targets above made
	rm -rf $(VENV) dist results_tiny trained_tiny .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
