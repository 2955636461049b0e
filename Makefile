# `make demo` and `make test` set everything up by themselves, in .venv.
#
#   make test PYTHON=python3.13       another interpreter (3.11 or newer) for a .venv that does not exist yet
#   make install TORCH_FLAGS="..."    extra pip flags for torch alone, for instance the --index-url
#                                     of its CPU or CUDA builds
#   make test WORKERS=8 ARGS="-k lora"

PYTHON ?= python3
TORCH_FLAGS ?=
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.installed-demo
ALL := $(VENV)/.installed-all
PIP := $(BIN)/python -m pip --disable-pip-version-check
# each worker is a process: one thread each, or they fight over the cores
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
          $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all bench lint format docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP) ## create .venv and install the library, the demo's model and the development tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deltaworks needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: unconstrained, pip may choose another build of several gigabytes
$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH_FLAGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(STAMP): $(DEMO)
	$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(ALL): $(STAMP)
	$(PIP) install -c constraints.txt -e '.[gpu]'
	@touch $@

demo: $(DEMO) ## compare methods on a real pretrained model, without network; writes runs/demo/report.html
	$(BIN)/deltaworks compare --protocol quick --out runs/demo

test: $(STAMP) ## the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(ALL) ## all tests
	$(PYTEST) $(ARGS)

bench: $(STAMP) ## memory, time and files beside peft, measured here; writes benchmarks/results/lean.json and .md
	$(BIN)/python benchmarks/lean.py all --keep $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the documentation as pages in site/, which load nothing from a network
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build

clean: ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache dist build
