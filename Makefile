# `make demo` and `make test` work as the first command on a machine with Python >= 3.11 and make.
# They share .venv; each installs its extras once, and again when a file that decides them changes.
#
#   make demo                           the main job: tokenizer, training, generation
#   make demo ARGS="--steps 2000"       the same with flags of scripts/demo.py
#   make test                           the tests, but those that take minutes
#   make test-slow                      these
#   make test ARGS="-k kda"             the same with flags of pytest
#   make test-engines                   these with llama.cpp, which it builds, and mlx-lm
#   make lint format typecheck          ruff, import-linter and mypy
#   make drawing                        docs/rooms.svg, of the present imports
#   make gpu-test                       the tests that need a CUDA device, in .venv-gpu
#   make clean                          remove the environments and caches
#
# PYTHON chooses the interpreter. constraints.txt pins what is installed, torch among it. Where the
# package index serves a CUDA build of torch (Linux), set PIP_EXTRA_INDEX_URL to PyTorch's CPU
# index for a small download; the pinned version is the same.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
INPUTS := setup.cfg pyproject.toml constraints.txt
# Folders of the package.
ROOMS := cache checkpoints decode generation inputs layers ops parallel quantization tokenizer training upstream
LINK := build/checked/kimi_linear
# llama.cpp's source, converter included, as the source archive of llama-cpp-python carries it; or
# LLAMA_CPP=DIR, a checkout that is built.
LLAMA_CPP_PYTHON := 0.3.36
LLAMA_CPP ?= build/llama.cpp
ENGINE_RESULTS ?= benchmarks/results/engine_tests.txt
ARGS ?=

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test test-slow test-engines lint format typecheck drawing gpu-test clean

# glibc gives memory back that the next operation asks for again, which takes an eighth of a step;
# and threads that spin for long while they wait take the time of whoever else is there.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 \
	MALLOC_TOP_PAD_=268435456 GOMP_SPINCOUNT=10000

demo: $(VENV)/train.stamp
	$(KEEP_MEMORY) $(BIN)/python scripts/demo.py $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not slow and not engines" $(ARGS)

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

test-engines: $(VENV)/test.stamp $(LLAMA_CPP)/build/bin/llama-server
	KIMI_LLAMA_CPP=$(abspath $(LLAMA_CPP)) KIMI_ENGINE_RESULTS=$(ENGINE_RESULTS) \
		$(BIN)/python -m pytest -m engines tests/engines $(ARGS)

# Needs cmake and a C++ compiler, and 15 minutes on two cores.
build/llama.cpp/build/bin/llama-server: | $(BIN)/python
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest build \
		llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf build/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C build --strip-components 2 \
		llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp
	cmake -S build/llama.cpp -B build/llama.cpp/build -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build build/llama.cpp/build --parallel 2 \
		--target llama-quantize llama-perplexity llama-completion llama-server

lint: $(VENV)/dev.stamp $(LINK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(dir $(LINK)) && ../../$(BIN)/lint-imports --no-logo --no-cache ../../setup.cfg

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/dev.stamp $(LINK)
	cd $(dir $(LINK)) && ../../$(BIN)/mypy --config-file ../../setup.cfg --explicit-package-bases \
		kimi_linear/*.py $(addprefix kimi_linear/,$(ROOMS))

# mypy and import-linter see the package under its import name through this link, wherever the
# checkout lies and whatever its folder is called.
$(LINK):
	mkdir -p $(@D) && ln -sfn ../.. $@

drawing: | $(BIN)/python
	$(BIN)/python scripts/draw_rooms.py

gpu-test: .venv-gpu/gpu.stamp
	.venv-gpu/bin/python -m pytest -m gpu $(ARGS)

clean:
	rm -rf .venv .venv-gpu .venv-oldest .venv-kernels .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: $(INPUTS) | $(BIN)/python
	$(INSTALL) --editable '.[train]'
	touch $@

$(VENV)/test.stamp: $(INPUTS) | $(BIN)/python
	$(INSTALL) --editable '.[train,finetune,qlora,test]'
	touch $@

$(VENV)/dev.stamp: $(INPUTS) | $(BIN)/python
	$(INSTALL) --editable '.[train,finetune,qlora,test,dev]'
	touch $@

# Not held to constraints.txt: a GPU wants the torch, CUDA and triton that fit its driver.
.venv-gpu/gpu.stamp: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[gpu,train,test]'
	touch $@
