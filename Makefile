# Every target sets itself up: the first call makes .venv and installs the package into it.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage test-lowest lint format types bench clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m adamerge.fit --config configs/demo.yaml

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# The exhaustive rest: whole trainings, every architecture, pools trained anew.
test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m slow $(ARGS)

# The same, and which lines it runs; it takes half as long again.
coverage: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov=adamerge --cov-report=term $(ARGS)

# What `make test` runs, on the oldest set of torch, lightning and transformers that is supported; pyproject.toml names them.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

$(LOWEST)/.installed: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet "torch==2.10.0" "lightning==2.6.0" "transformers==4.57.6" --editable ".[dev]"
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sizes.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/peers.py --images 16
	$(BIN)/python benchmarks/peers.py --peaks 5 --images 16
	$(BIN)/python benchmarks/peers.py --limit-tasks
	$(BIN)/python benchmarks/concrete.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/preflight.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/surgery.py
	$(BIN)/python benchmarks/surgery.py --peer
	$(BIN)/python benchmarks/surgery.py --peer --zoo
	$(BIN)/python benchmarks/zoo.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
