# make demo   the main job on a photograph: out/demo holds the picture
# make test   everything that runs without a GPU (and, with one, everything)
# make sanitize  the CPU library's tests under sanitizers
# make bench  the operators beside the reference, timed on this machine; make report puts the figures in a page
# make lint   ruff and clang-format; make format applies them
# make headers  csrc compiled against the headers of the oldest torch that will do, of 2.11 and of 2.15
# make lock   the versions that all of these install, chosen anew; make newest runs the tests on the newest of everything
#             but torch
# Each sets up .venv on first use, with the versions in constraints.txt. TORCH says which torch that is: to try another,
# TORCH=torch CONSTRAINTS=/dev/null VENV=.venv-torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/pip install --quiet
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h csrc/*/*/*.cpp)
LINTED := $(CPP) $(wildcard examples/cpp/*.cpp tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*.cu tests/emulation/include/*.h)

.PHONY: demo test headers sanitize bench report lint format lock newest clean

demo: $(VENV)/demo
	$(BIN)/lvtp demo --out out/demo

# JOBS processes share the files among them; much of the suite keeps one core busy.
JOBS ?= 2

# Passive: on a machine that others use too, OpenMP's waiting threads would spin away the core the working one needs
# (LAPACK's eigh on two threads, one core taken: 4 s instead of 60 ms).
test: $(VENV)/built
	OMP_WAIT_POLICY=passive PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# 2.11 is what rented machines with a GPU have, 2.15 the newest when this was last changed.
headers: $(VENV)/built
	$(BIN)/python tests/torch_headers.py 2.11.0 2.15.0

# The operators' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := tests/test_cosine_similarity.py tests/test_mean_similarity.py tests/test_greedy_suppression.py \
	tests/test_cluster_nms.py tests/test_psca.py tests/test_id_selection.py tests/test_prune_sid.py \
	tests/test_dynamic_budget.py tests/test_bad_input.py tests/test_cpu.py tests/test_properties.py

sanitize: $(VENV)/built
	rm -rf out/sanitized
	CMAKE_ARGS="-DLVTP_SANITIZE=address,undefined -DLVTP_CUDA=OFF" \
		$(PIP) --no-build-isolation --no-deps --target out/sanitized .
	PYTHONPATH=out/sanitized LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_WAIT_POLICY=passive $(BIN)/pytest -q -p no:cacheprovider -k "not reference" $(SANITIZED)

bench: $(VENV)/built
	$(PIP) --no-build-isolation -e ".[bench]"
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

# One set of versions for every Python that the package takes. uv reads the markers; pip installs.
lock: $(VENV)/bin/python
	$(BIN)/pip install --quiet --group lock
	mkdir -p out
	echo "$(TORCH)" >out/torch.txt
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --no-python-downloads --upgrade \
		--extra test --extra bench --group lmms-eval --group lint --group lock --constraint out/torch.txt \
		--no-annotate --custom-compile-command "make lock" --quiet --output-file constraints.txt
	sed -i.old '/^\(nvidia\|cuda\)-/d' constraints.txt && rm constraints.txt.old # each build of torch pins its own

newest:
	rm -rf .venv-newest $(VENV)/built $(VENV)/demo # its build takes the place of theirs
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

clean:
	rm -rf build dist out lvtp/lib *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

# Build requirements come first, then the package without isolation, so that a rebuild compiles only what changed. The
# demonstration needs less of everything: no test tools, and the CUDA library only where there is a GPU.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(CONSTRAINTS) $(CPP)

$(VENV)/demo: $(SOURCES) | $(VENV)/bin/python
	$(PIP) "$(TORCH)" "setuptools>=77" wheel "cmake>=3.25" ninja
	CMAKE_ARGS="-DLVTP_CUDA=$(if $(shell command -v nvidia-smi),ON,OFF) $(CMAKE_ARGS)" $(PIP) --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/built: $(SOURCES) | $(VENV)/bin/python
	$(PIP) "$(TORCH)" "setuptools>=77" wheel "cmake>=3.25" ninja jaxlib
	CMAKE_ARGS="-DLVTP_CUDA=ON $(CMAKE_ARGS)" $(PIP) --no-build-isolation -e ".[test]"
	$(PIP) --group lmms-eval && $(PIP) --no-deps lmms-eval==0.7.3
	touch $(VENV)/demo $@

$(VENV)/linters: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --group lint
	touch $@
