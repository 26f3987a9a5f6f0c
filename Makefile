# The one set of verbs: CI and the README call the same ones. Each makes the .venv it needs.
#
#   make demo    the laptop recipe, from nothing to a report
#   make test    the tests
#   make lint    ruff and mypy
#   make check   lint, then test
#   make docs    the tests that hold the docs true
#   make bench   what benchmarks/ measures and how to start each
#   make bench-gpu   training and decoding on one GPU beside transformers
#
# PYTHON=python3.12 picks another Python; TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch without CUDA.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q -c constraints-cpu.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint check docs bench bench-gpu

demo: .venv/.core
	$(BIN)/puna run recipes/laptop.toml --out runs/laptop

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test

docs: .venv/.dev
	$(BIN)/python -m pytest tests/docs

bench:
	@find benchmarks -name '*.py' | sort | while read -r script; do \
		echo "$(BIN)/python $$script    $$(sed -n '1s/^"""\([^"]*\).*/\1/p' $$script)"; done

bench-gpu: .venv/.dev
	$(BIN)/python benchmarks/gpu.py

# A stamp is the last thing an installation makes, and none stands while one runs: what was interrupted is made anew.
.venv/.core: pyproject.toml constraints-cpu.txt
	@echo "installing puna into .venv"
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@$(INSTALL) -e .
	@$(BIN)/python -c "import torch; print('torch', torch.__version__)"
	@touch $@

.venv/.dev: .venv/.core
	@echo "installing the tools for development into .venv"
	@rm -f .venv/.core
	@$(INSTALL) -e '.[dev]'
	@touch .venv/.core $@
