# make setup | demo | test | lint. PYTHON picks the interpreter, CONSTRAINTS the file of tested versions.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first, pinned: any looser request could bring gigabytes of another build.
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable ".[eval,mlx,dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/mohawkify demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
