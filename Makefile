# Every target sets up what it needs: .venv with pinned packages and the C++ extension. A second call skips that.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Python 3.10 to 3.12; `make PYTHON=/path/to/python3.12 ...` chooses another one.
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

HARDWARE := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo h100 || echo cpu)
CONSTRAINTS := constraints/$(HARDWARE).txt

BIN := .venv/bin
PEER := .venv/peer-trl
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed-$(HARDWARE)
# The H100 stack's, beside a newer one: tests read what both make of our kernels.
OLDER_TRITON := 3.6.0
# Of the machine with the GPU.
GPU_PYTHON := 3.12
GPU_WHEELS := megatron-core pydantic pydantic-core annotated-types typing-inspection typing-extensions tomli-w sentencepiece nvidia-ml-py liger-kernel
BUILT_FROM := setup.py CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
LINTED := nova_sys kernels benchmarks tests setup.py

.PHONY: help setup demo test lint truth bench bench-data bench-trl peer-trl parity gpu-check gpu-wheels clean

help:
	@echo 'make demo    align a small model from nothing: data, tokenizer, SFT, DPO, evaluation, into runs/demo'
	@echo 'make test    every test that needs neither a GPU nor more than a minute'
	@echo 'make lint    ruff, clang-format, pyright'
	@echo 'make truth   how far every layout is from one rank, measured, into docs/trust.md'
	@echo 'make bench   the benchmarks of benchmarks/registry.py, into benchmarks/results'
	@echo 'make bench-data   10 million documents tokenised, packed and loaded; needs 7 GB in OUT (runs/bench-data)'
	@echo 'make bench-trl DATA=PAIRS   a DPO step against TRL, on a CPU; TRL in an environment of its own'
	@echo 'make parity DATA=PAIRS   the same log-probs, losses and weights as TRL, within bounds, on a CPU; without DATA on tasks of the demo'
	@echo 'make gpu-check   on a Hopper GPU: GPU tests, microbenchmarks, training steps, in 8 minutes; from the source tree, with the packages of PYTHON'
	@echo 'make gpu-wheels  into .whl: what a machine with torch and no network lacks for it (docs/gpu.md)'
	@echo 'make setup   .venv with pinned packages ($(CONSTRAINTS)) and the C++ extension'
	@echo 'make clean   remove build products (not .venv, not runs)'

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/nova demo --out runs/demo

# One process per core, up to 4: many tests start ranks of their own. A file stays in one process, for its fixtures.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu' -q --durations=10 \
		-n $(shell n=$$(nproc); echo $$((n < 4 ? n : 4))) --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/pyright

truth: $(INSTALLED)
	$(BIN)/python benchmarks/one_truth.py
	$(BIN)/python benchmarks/report.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/report.py

bench-data: $(INSTALLED)
	$(BIN)/python benchmarks/data.py --out $(or $(OUT),runs/bench-data) $(ARGS)
	$(BIN)/python benchmarks/report.py

bench-trl: $(INSTALLED) peer-trl
	$(BIN)/python benchmarks/step.py --peer trl $(if $(DATA),--data '$(DATA)') $(ARGS)
	$(BIN)/python benchmarks/report.py

parity: $(INSTALLED) peer-trl
	$(BIN)/python -m pytest -q tests/unit/test_chat_families.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/parity.py $(if $(DATA),--data '$(DATA)') $(ARGS)
	$(BIN)/python benchmarks/report.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(or $(OUT),runs/gpu-check) $(ARGS)

gpu-wheels: $(BIN)/python
	$(PIP) download -q -d .whl --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
		$(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64) -c constraints/h100.txt $(GPU_WHEELS)
	$(PIP) download -q -d .whl --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
		-c constraints/peer-trl.txt trl datasets dill multiprocess accelerate

peer-trl: $(PEER)/.installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f kernels/nova_kernels/_C*.so kernels/nova_kernels/*.sources .venv/.installed-*

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.10, 3.11 or 3.12 was not found: install one, or say make PYTHON=/path/to/python3.12'; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo '$(PYTHON) is not Python 3.10, 3.11 or 3.12'; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(PEER)/.installed: constraints/peer-trl.txt | $(BIN)/python
	$(BIN)/python -m venv $(PEER)
	$(PEER)/bin/python -m pip --disable-pip-version-check install -q -c constraints/peer-trl.txt trl torch
	touch $@

$(INSTALLED): pyproject.toml constraints/common.txt $(CONSTRAINTS) $(BUILT_FROM) | $(BIN)/python
	$(PIP) install -q -c $(CONSTRAINTS) setuptools wheel pybind11 cmake ninja
	$(PIP) install -q -c $(CONSTRAINTS) --no-deps torch
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	if [ $(HARDWARE) = cpu ] && [ ! -d .venv/triton-$(OLDER_TRITON) ] && \
		$(BIN)/python -c 'import triton; exit(triton.__version__ == "$(OLDER_TRITON)")'; then \
		$(PIP) install -q --no-deps --target .venv/triton-$(OLDER_TRITON) triton==$(OLDER_TRITON); fi
	touch $@
