# `make run` and `make test` do everything from a fresh clone. Another Python: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin

.PHONY: run test nightly oldest gpu lint install

run: install
	$(BIN)/python -m orchestrator.launch --config recipes/shapes.toml \
		$$($(BIN)/python -c 'import torch; print("--gpus all" if torch.cuda.is_available() else "--cpus 2")')

test: install
	$(BIN)/python -m pytest -m "not slow"

nightly: install
	$(BIN)/python -m pytest

oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.venv-oldest.txt

.venv-oldest.txt: pyproject.toml
	sed -nE 's/^(    |fast = \[)"(.+)>=(.+)".*/\2==\3/p' $< > $@

gpu: install
	$(BIN)/python -m pytest -m gpu -rs

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@
