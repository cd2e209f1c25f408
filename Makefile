# Everything runs in a virtual environment of the project's own: PYTHON makes it, nothing else is needed.
PYTHON ?= python3
# Tests wait for servers now and then: five processes keep two cores busy.
WORKERS ?= 5
VENV := .venv
BIN := $(VENV)/bin

# A virtual environment that could not be finished (Debian without python3-venv) is made anew.
.DELETE_ON_ERROR:

.PHONY: help demo test lint types check bench torture clean

help:
	@echo "make demo    the six operations, live; URL=redis://... shows them on a server of yours"
	@echo "make test    the whole suite, on memory and on every server found"
	@echo "make clean   removes what the others made: then PYTHON=python3.13 chooses another Python"
	@echo "make check   lint, types and the suite"
	@echo "make torture campaigns of faults, for most of an hour; ARGS='--scale 0.1 sentinel' for a part"
	@echo "make bench   speed and memory, as ratios; writes bench.json"

# A URL of the environment is some other program's: the command line's counts.
demo: $(VENV)/demo
	@$(BIN)/sessiongate demo $(if $(filter command line,$(origin URL)),--url "$$URL")

# Each of the processes would compile all tests anew if nothing may be kept: here it may.
test: export PYTHONDONTWRITEBYTECODE =
test: export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/pycache
test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

check: lint types test

bench: $(VENV)/dev
	$(BIN)/python -m tests.bench

torture: $(VENV)/dev
	$(BIN)/python -m tests.torture $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info bench.json

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "SessionGate needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# The stamps say which set of dependencies is in; `dev` holds all of `demo`.
$(VENV)/demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[memory]'
	@touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[memory,fast,msgpack,dev]'
	@touch $@ $(VENV)/demo
