# Everything a fresh machine needs is in `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-fast check format bench docs clean

help:
	@echo "make demo    train SGD, SAM and NSO on real digits, measure flatness, write a report (offline)"
	@echo "make test    all tests        make test-fast   without the slow ones"
	@echo "make check   ruff, pyright, import directions"
	@echo "make bench   step time over its bound, on this machine"
	@echo "make docs    build the documentation into site/"

# One stamp per set of extras: an install happens only when what it depends on has changed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/lab.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[lab]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[docs]"
	@touch $@

demo: $(VENV)/lab.stamp
	$(BIN)/flatmin compare --name demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.averaging
	$(BIN)/python -m benchmarks.collectives

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

clean:
	rm -rf $(VENV) site
