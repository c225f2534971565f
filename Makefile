# Every target does the set-up it needs; a second call only repeats what changed.
#   make test PYTHON=python3.12 VENV=/tmp/venv   another interpreter, another virtual environment
#   make demo TORCH=torch==2.11.0                another torch (one that is installed is used as it is)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH ?= lrua
BENCH_CUDA ?= --json benchmarks/results/cuda.json

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CXX_SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
FORMATTED := $(CXX_SOURCES) $(wildcard tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cu)
BUILD_INPUTS := setup.py pyproject.toml $(CXX_SOURCES)

ifneq ($(wildcard ../shared/data/.),)
export MANN_EXT_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test bench test-cuda bench-cuda build-cuda lint format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo ## train a small MANN on Omniglot, a few minutes
	$(BIN)/mann-ext train demo $(DEMO_ARGS)

# Threads wait asleep: beside another busy process those that spin take many times as long.
test: $(VENV)/.installed-dev ## run the tests (PYTEST_ARGS="-k lrua" for some of them)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
	  $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev ## measure the operators (BENCH="lrua --json results.json")
	$(BIN)/python -m benchmarks $(BENCH)

# The three -cuda targets use PYTHON as it is: a GPU machine has its own torch, and maybe no network.
build-cuda: ## compile the operators, the CUDA ones too, for the installed PYTHON
	MANN_EXT_CUDA=1 $(PYTHON) setup.py build_ext --inplace

SANITIZE = compute-sanitizer --error-exitcode 1 --target-processes all
SANITIZED = -m pytest -q -x -p no:cacheprovider tests/test_cuda.py \
  -k "float64 and (typical or reset or several or coordinates or pool) or lstm_reset"

test-cuda: build-cuda ## run the operators' tests on the GPU, and a few under compute-sanitizer
	$(PYTHON) -m pytest -q tests/test_cuda.py $(PYTEST_ARGS)
	$(SANITIZE) --tool memcheck $(PYTHON) $(SANITIZED)
	$(SANITIZE) --tool racecheck $(PYTHON) $(SANITIZED)

bench-cuda: build-cuda ## measure the CUDA operators (BENCH_CUDA="--json results.json")
	$(PYTHON) -m benchmarks.cuda $(BENCH_CUDA)

lint: $(VENV)/.installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(VENV)/.installed-demo ## install the package in the virtual environment, operators compiled
	$(BIN)/python -m mann_ext.info

clean: ## remove what was built, not the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f mann_ext/*.so $(VENV)/.installed-demo $(VENV)/.installed-dev
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The constraint keeps the extras from replacing the torch that is there.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $@.new
	$(PIP) install ninja 'pybind11>=2.12' 'setuptools>=77' wheel numpy
	mv $@.new $@

$(VENV)/.installed-demo: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --constraint $(VENV)/.torch -e '.[train,data,figures]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --constraint $(VENV)/.torch \
	  -e '.[train,data,figures,baselines,dev]'
	touch $@ $(VENV)/.installed-demo
