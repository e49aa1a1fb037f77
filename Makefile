# Every target makes its own virtual environment first; nothing outside the checkout is touched but the kernel cache.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test bench lint native emulator gpu-check sanitize clean

demo: $(VENV)/.run
	$(BIN)/python demo.py $(ARGS)

test: $(VENV)/.test emulator
	$(BIN)/python -m pytest -q -n 2 --ignore-glob="tests/phase*" $(ARGS)
	$(BIN)/python test_all.py

bench: $(VENV)/.test
	$(BIN)/python -m bench.run $(ARGS)
	$(BIN)/python -m bench.sampler
	$(BIN)/python -m bench.loading
	$(BIN)/python -m bench.partition
	$(BIN)/python -m bench.report

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'src/*.h' 'src/*.cpp' 'tests/native/*.cpp' 'tests/native/*.h')

# The native module alone, without pip: what test_all.py and demo.py find in build/x64-release.
native:
	cmake --preset x64-release
	cmake --build build/x64-release --target ch16

# GPU kernels are tested in an emulator of a CUDA device, and their launcher on its fake driver.
emulator: $(VENV)/.test
	cmake --preset x64-release
	cmake --build build/x64-release --target nvemu fakecuda fakecublas

# Kernels for a machine with a GPU of NVIDIA's, into build/gpu_check. There, offline and without any of this:
# python3 -m tools.gpu_check run --out build/gpu_check.json
gpu-check: $(VENV)/.test
	$(BIN)/python -m tools.gpu_check prepare $(foreach chip,$(CHIPS),--chip $(chip))

sanitize:
	cmake --preset x64-asan
	cmake --build build/x64-asan
	ctest --test-dir build/x64-asan --output-on-failure

NATIVE_SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/*.cpp src/*.h src/bind/*.cpp src/bind/*.h)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: $(NATIVE_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(NATIVE_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.run

$(VENV)/.dev: $(NATIVE_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.run $(VENV)/.test

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
