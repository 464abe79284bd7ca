PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# "The data cannot tell" (exit code 3) is an answer, not a failure of make.
UNDETERMINED_IS_FINE := || [ $$? -eq 3 ]

.PHONY: demo test test-all lint figures family bench clean

demo: $(BASE)  ## answer the question on the bundled model and documents
	mkdir -p build/demo
	$(BIN)/loopdiag recommend --figures build/demo/figures --json build/demo/answer.json \
		--save build/demo/diagnosis.nc $(UNDETERMINED_IS_FINE)

test: $(DEV)  ## the fast tests
	$(BIN)/python -m pytest

test-all: $(DEV)  ## every test
	$(BIN)/python -m pytest -m ""

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(BASE)  ## measure the bundled model and draw figures/ from the saved diagnosis
	mkdir -p build
	$(BIN)/loopdiag diagnose --save build/tiny-plt-4.nc
	$(BIN)/loopdiag recommend build/tiny-plt-4.nc --figures figures $(UNDETERMINED_IS_FINE)

family: $(DEV)  ## train the bundled models again (an hour on two cores; goes on where it stopped)
	$(BIN)/python -m loopdiag.sweep.family

bench: $(BASE)  ## cost of the hook points, memory of loading
	$(BIN)/python benchmarks/hook_overhead.py
	$(BIN)/python benchmarks/loading_memory.py

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $(BASE)

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,notebooks]"
	touch $(DEV)

clean:
	rm -rf build $(VENV)
