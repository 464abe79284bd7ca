PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# "The data cannot tell" (exit code 3) is an answer, not a failure of make.
UNDETERMINED_IS_FINE := || [ $$? -eq 3 ]

.PHONY: demo test test-slow test-all lint docs notebooks notebooks-run figures saved emergence family families findings probes bench clean

demo: $(BASE)  ## answer the question on the bundled model and documents
	mkdir -p build/demo
	$(BIN)/loopdiag recommend --figures build/demo/figures --json build/demo/answer.json \
		--save build/demo/diagnosis.nc $(UNDETERMINED_IS_FINE)

# On busy cores a second thread makes models as small as these several times slower: a process for each core instead.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TESTS := --numprocesses auto --dist loadfile tests
NOTEBOOKS := --nbmake --nbmake-timeout=180 --numprocesses auto
FIRST := notebooks/01_first_look.ipynb

test: $(DEV)  ## the fast tests, and the first notebook
	$(PYTEST) $(TESTS)
	$(PYTEST) $(NOTEBOOKS) $(FIRST)

test-slow: $(DEV)  ## the slow tests, and the other notebooks
	$(PYTEST) $(TESTS) -m slow
	$(PYTEST) $(NOTEBOOKS) --ignore=$(FIRST) notebooks

test-all: test test-slow  ## every test and notebook

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEV)  ## build the documentation in build/docs/html; a warning is an error
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --nitpicky --quiet \
		-d build/docs/doctrees docs build/docs/html

notebooks: $(DEV)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

notebooks-run: $(DEV)  ## run the notebooks again in place, as they are committed: no times, no versions
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		--ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.preserve_nb_metadata_mask="{'kernelspec'}" notebooks/*.ipynb

# What the figures need beyond the default measures.
MEASURES := default,heads,rarefaction,pooled,fixed_point,noise,exit_rules
SAVED := $(foreach loops,1 2 3 4,figures/saved/tiny-plt-$(loops).nc)

figures: $(BASE) $(SAVED) emergence  ## draw figures/ and write its tables and docs/reproduction.md, from the saved diagnoses
	$(BIN)/loopdiag figures $(SAVED) --out figures --against-paper docs/reproduction.md

saved: $(BASE)  ## diagnose the bundled models again, for `make figures` (ten minutes)
	rm -f $(SAVED)
	$(MAKE) $(SAVED)

figures/saved/%.nc: | $(BASE)
	mkdir -p figures/saved
	$(BIN)/loopdiag diagnose $* --measures $(MEASURES) --save $@

emergence: $(BASE) figures/saved/emergence.json  ## draw what each loop brings during training, from the saved looks
	$(BIN)/python -c "from loopdiag.plots.training import draw_emergence; \
		draw_emergence('figures/saved/emergence.json', 'figures')"

figures/saved/emergence.json: | $(DEV)  # trains for about a quarter of an hour on one core
	OMP_NUM_THREADS=1 $(BIN)/python -m loopdiag.sweep.family --work build/emergence --out build/emergence/models \
		--loops 4 --tokens 2621440 --no-compile --looks $@

family: $(DEV)  ## train the bundled models again (an hour on two cores; goes on where it stopped)
	$(BIN)/python -m loopdiag.sweep.family

families: $(DEV)  ## train the backtest's families (ten hours on two cores; goes on where it stopped)
	$(BIN)/python benchmarks/families.py

findings: $(DEV)  ## write docs/findings.md and draw figures/sweeps from what the families were measured to be
	$(BIN)/python benchmarks/findings.py

probes: $(BASE)  ## probe two of the bundled models: every result in probes/ (ten minutes on one core)
	for model in tiny-plt-4 tiny-plt-2; do \
		for suite in position_identity code_structure lookahead carried_information; do \
			case $$suite in carried*) hooks="--hook hook_carry --hook hook_in --hook hook_out" ;; *) hooks= ;; esac; \
			OMP_NUM_THREADS=1 $(BIN)/loopdiag probe $$suite $$model $$hooks --figures probes/$$suite --quiet || exit 1; \
		done; \
	done

bench: $(BASE)  ## cost of the hook points and of measuring, memory of loading
	$(BIN)/python benchmarks/hook_overhead.py
	$(BIN)/python benchmarks/loading_memory.py
	$(BIN)/python benchmarks/overhead.py

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $(BASE)

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,notebooks,docs]"
	touch $(DEV)

clean:
	rm -rf build $(VENV)
