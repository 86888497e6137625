# make demo   the main job on a photograph: out/demo holds the picture
# make test   everything that runs without a GPU (and, with one, everything)
# make sanitize  the CPU library's tests under sanitizers
# make bench  the operators beside the reference, timed on this machine; make report puts the figures in a page
# make lint   ruff and clang-format; make format applies them
# Each sets up .venv on first use. TORCH says which torch that is, for example TORCH=torch for the newest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h csrc/*/*/*.cpp)
LINTED := $(CPP) $(wildcard examples/cpp/*.cpp tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*.cu tests/emulation/include/*.h)

.PHONY: demo test sanitize bench report lint format clean

demo: $(VENV)/built
	$(BIN)/lvtp demo --out out/demo

# Passive: on a machine that others use too, OpenMP's waiting threads would spin away the core the working one needs
# (LAPACK's eigh on two threads, one core taken: 4 s instead of 60 ms).
test: $(VENV)/built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

# The operators' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := tests/test_cosine_similarity.py tests/test_mean_similarity.py tests/test_greedy_suppression.py \
	tests/test_cluster_nms.py tests/test_psca.py tests/test_id_selection.py tests/test_prune_sid.py \
	tests/test_dynamic_budget.py tests/test_bad_input.py tests/test_cpu.py tests/test_properties.py

sanitize: $(VENV)/built
	rm -rf out/sanitized
	CMAKE_ARGS="-DLVTP_SANITIZE=address,undefined -DCMAKE_CUDA_COMPILER=NOTFOUND" \
		$(BIN)/pip install --quiet --no-build-isolation --no-deps --target out/sanitized .
	PYTHONPATH=out/sanitized LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_WAIT_POLICY=passive $(BIN)/pytest -q -p no:cacheprovider -k "not reference" $(SANITIZED)

bench: $(VENV)/built
	$(BIN)/pip install --quiet -e ".[bench]" --no-build-isolation
	mkdir -p out
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-quiet --benchmark-json=out/ops.json
	$(BIN)/python -m bench.runs out/ops.json

report:
	$(BIN)/python -m bench.report

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(LINTED)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(LINTED)

clean:
	rm -rf build dist out lvtp/lib *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"

# Build requirements come first, then the package without isolation, so that a rebuild compiles only what changed.
$(VENV)/built: $(VENV)/bin/python pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel "cmake>=3.25" ninja jaxlib
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test]"
	$(BIN)/pip install --quiet --group lmms-eval && $(BIN)/pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

$(VENV)/linters: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --group lint
	touch $@
