# The daily commands. Each target makes the environment that it needs from $(PYTHON).
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
INSTALLED := $(VENV)/installed

.PHONY: test demo style format gates venv clean

test: style
	python -m pytest -n 2

demo: $(INSTALLED)
	python -m fused_attn demo

style: $(INSTALLED)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	mypy

format: $(INSTALLED)
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

gates: $(INSTALLED)
	python benchmarks/cpu_gates.py

venv: $(INSTALLED)

# Without build isolation the build folder stays valid, and a change in csrc recompiles only what
# depends on it.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet -c constraints.txt setuptools cmake ninja pybind11
	python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev,demo]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_attn/_C.*
