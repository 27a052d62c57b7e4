# Every target makes its environment first and reuses it while pyproject.toml stays the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text test test-slow golden test-xla gpu coverage bench lint format clean

help:  ## this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY)  ## the environment, with everything the other targets need

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(READY)  ## both stages on handwritten digits, to a picture and a table of scores, on a CPU within minutes
	$(BIN)/rae-demo

demo-text: $(READY)  ## pictures from sentences: all stages on pictograms with captions, on a CPU within 25 minutes
	$(BIN)/rae-demo pictures

test: $(READY)  ## the fast tests: no GPU, no downloads; two minutes on two quick cores
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not gpu" -n 2 --dist worksteal --durations=5

test-slow: $(READY)  ## the tests that take longer
	OMP_NUM_THREADS=1 $(PYTEST) -m "slow and not gpu" -n 2 --dist worksteal --durations=10

DIR ?= tests/golden

golden: $(READY)  ## numeric cases computed with the authors' code: those of tests/golden, or of DIR=folder
	RAE_GOLDEN_DIR=$(abspath $(DIR)) OMP_NUM_THREADS=1 $(PYTEST) tests/test_golden.py

XLA_VENV ?= .venv-xla
XLA_READY := $(XLA_VENV)/.installed
# Most of the time is compilation: without optimisation it takes a third.
XLA_QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

# torch_xla fits one torch alone, so it has an environment of its own.
$(XLA_READY): pyproject.toml
	@test -x $(XLA_VENV)/bin/pip || $(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.9.0 torch_xla==2.9.0 torchvision==0.24.0 pytest --editable .
	@touch $@

test-xla: $(XLA_READY)  ## training, sampling and decoding on an XLA device (its CPU) against the CPU; 6 GB of packages
	PJRT_DEVICE=CPU XLA_FLAGS="$(XLA_QUICK)" $(XLA_VENV)/bin/python -m pytest -q tests/xla

gpu: $(READY)  ## on one GPU, in 8 minutes: the tests that need it and the benchmark; without one, tests with fake CUDA tensors
	$(BIN)/python -m tests.on_gpu

coverage: $(READY)  ## the fast and the slow tests; prints the files of which they reach less than 90 %, and the total
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m "not gpu"
	$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report | awk '/^(Name|TOTAL|-)/ || $$NF + 0 < 90'

BENCHMARKS := loader stage1_step stage2_step sampling raev2 autoencoder onnx_cpu fid scaling
BENCH := outputs/bench

bench: $(READY)  ## ours against its peers, side by side: JSON files and a table; 40 minutes on two cores
	@mkdir -p $(BENCH)
	@for name in $(BENCHMARKS); do \
		echo "$$name"; $(BIN)/python tests/benchmarks/$$name.py --json $(BENCH)/$$name.json || exit 1; \
	done
	@$(BIN)/python tests/benchmarks/table.py $(BENCH)

lint: $(READY)  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## mends style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes the environment, caches and built files; results in outputs/ and demo/ stay
	rm -rf $(VENV) $(XLA_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
	find rae tests -name __pycache__ -type d -prune -exec rm -rf {} +
