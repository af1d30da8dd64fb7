# `make demo` and `make test` do everything on a fresh machine with Python 3.10+ and a C++ compiler. Later runs rebuild
# only after a change. TORCH=2.12.1 selects another torch; DALLE_FAST_CUDA=0 or 1 excludes or requires CUDA kernels.

TORCH ?= 2.13.0
PYTHON ?= python3

BIN := .venv/bin
TORCH_STAMP := .venv/.torch-$(TORCH)
BUILD_STAMP := .venv/.built
OP_TESTS := $(addprefix tests/test_,$(addsuffix .py,sparse_attention decode_attention packed_linear sample gumbel philox_uniform resblock resblock_scales adamw16 minifloat derivatives raw_ops)) tests/fuzz/test_fuzz_ops.py
# Tests of the ops that have a CUDA kernel.
CUDA_OP_TESTS := $(addprefix tests/test_,$(addsuffix .py,adamw16 sparse_attention decode_attention gumbel minifloat resblock resblock_scales philox_uniform sample))
CXX_FILES := $(shell find csrc tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: build demo test lint bench bench-end-to-end format pretrained asan cuda-on-cpu cuda-races gpu fuzz

build: $(BUILD_STAMP)

# Images by the shipped model within a minute, then a system from scratch.
demo: build
	$(BIN)/dalle-fast demo

# The op tests run once more on the kernels for any processor.
test: build
	@echo "All tests take about 6 minutes on two cores."; start=$$(date +%s); export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -n 2 && DALLE_FAST_SIMD=portable $(BIN)/python -m pytest -n 2 $(OP_TESTS); \
	status=$$?; seconds=$$(($$(date +%s) - start)); echo "The tests took $$((seconds / 60)) min $$((seconds % 60)) s."; exit $$status

# Random inputs to everything that takes some, many more than in `make test`.
fuzz: build
	DALLE_FAST_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/fuzz

# The op tests on a build that checks every address and every undefined operation. Python is not part of that build, so
# the checkers' libraries come first by hand, and what Python itself keeps until its end is not counted as a leak.
PRELOAD = LD_PRELOAD="$(foreach library,$(1) stdc++,$$(gcc -print-file-name=lib$(library).so))"
SANITIZED = $(call PRELOAD,asan ubsan) ASAN_OPTIONS=detect_leaks=0

asan: build
	DALLE_FAST_SANITIZE=address $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	$(SANITIZED) OMP_NUM_THREADS=2 PYTHONPATH=build/asan/lib $(BIN)/pytest $(OP_TESTS)

# The same tests and checks on the CUDA kernels, compiled for the CPU: no GPU, no CUDA toolkit.
cuda-on-cpu: build
	DALLE_FAST_SANITIZE=address DALLE_FAST_CUDA_ON_CPU=1 \
	$(BIN)/python setup.py --quiet build --build-base build/cuda_on_cpu_asan --build-lib build/cuda_on_cpu_asan/lib
	$(SANITIZED) OMP_NUM_THREADS=1 PYTHONPATH=build/cuda_on_cpu_asan/lib $(BIN)/pytest -n 2 $(CUDA_OP_TESTS)

# And once more, to find threads of a block that touch the same memory without a barrier between: a process that has one
# ends there, and says why in build/cuda_on_cpu_tsan/race.*.
cuda-races: build
	DALLE_FAST_SANITIZE=thread DALLE_FAST_CUDA_ON_CPU=1 \
	$(BIN)/python setup.py --quiet build --build-base build/cuda_on_cpu_tsan --build-lib build/cuda_on_cpu_tsan/lib
	$(call PRELOAD,tsan) TSAN_OPTIONS=halt_on_error=1:log_path=build/cuda_on_cpu_tsan/race OMP_NUM_THREADS=1 \
	PYTHONPATH=build/cuda_on_cpu_tsan/lib $(BIN)/pytest -n 2 $(CUDA_OP_TESTS)

# What only a GPU can check; see benchmarks/gpu.py. It uses the installed torch, and no network.
gpu:
	$(PYTHON) benchmarks/gpu.py

lint: build
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

BENCH := $(BIN)/python -m pytest --benchmark-quiet -q --results benchmarks/results

bench: build
	$(BENCH) benchmarks --ignore benchmarks/bench_end_to_end.py

# A quarter of an hour. dalle-pytorch declares packages that these measurements do not need.
bench-end-to-end: build
	$(BIN)/python -m pip install --quiet --no-deps dalle-pytorch==1.6.6 axial_positional_embedding einops rotary-embedding-torch
	$(BENCH) benchmarks/bench_end_to_end.py

format: build
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

pretrained: build
	$(BIN)/python -m dalle_fast.demo.run --pretrained
	mkdir -p docs
	cp runs/pretrained/sheet.png runs/pretrained/reconstructions.png runs/pretrained/losses.png docs/

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" setuptools wheel pybind11 ninja numpy
	rm -f .venv/.torch-*
	touch $@

$(BUILD_STAMP): $(TORCH_STAMP) setup.py pyproject.toml $(CXX_FILES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
