# make setup | demo | test | test-all | lint | soak. PYTHON picks the interpreter, CONSTRAINTS the file of tested versions.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint soak soak-trials soak-fuzz

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first, pinned: any looser request could bring gigabytes of another build.
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable ".[eval,mlx,serve,dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/mohawkify demo

# A file stays in one process, which builds its teachers and runs once; tests/conftest.py puts the slowest files first.
# A third process works while others wait for children or the clock.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

test: lint
	$(PYTEST)

test-all: setup
	$(PYTEST) -m full

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The long forms of tests/soak and tests/fuzz, side by side on two cores; what they tried goes to docs/reliability.md.
SOAK := build/soak
SOAK_SHARE ?= 1
FUZZ_FACTOR ?= 50

soak: setup
	mkdir -p $(SOAK)
	rm -f $(SOAK)/soak.jsonl $(SOAK)/fuzz.jsonl
	$(MAKE) --jobs 2 soak-trials soak-fuzz
	$(BIN)/python -m tests.soak.report $(SOAK)/soak.jsonl $(SOAK)/fuzz.jsonl

soak-trials:
	OMP_NUM_THREADS=1 MOHAWKIFY_SOAK=1 MOHAWKIFY_SOAK_SHARE=$(SOAK_SHARE) MOHAWKIFY_SOAK_LOG=$(CURDIR)/$(SOAK)/soak.jsonl \
		$(BIN)/python -m pytest -m "" tests/soak

soak-fuzz:
	OMP_NUM_THREADS=1 MOHAWKIFY_FUZZ=$(FUZZ_FACTOR) MOHAWKIFY_FUZZ_LOG=$(CURDIR)/$(SOAK)/fuzz.jsonl \
		$(BIN)/python -m pytest -m "" tests/fuzz
