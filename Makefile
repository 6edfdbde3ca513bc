# make demo    set everything up, then pull, quantize, export and run the demo model; ends with its answer
# make test    set everything up, then run the whole test suite
# make lint    check style
# make lock    pin what the container installs, from pyproject.toml; LOCK_ARGS="--torch-cpu WHERE" for torch, too
# make clean   remove the environment and everything built
#
# PYTHON     the Python to make the environment with (3.11 or later)
# PIP_ARGS   passed to every pip install, e.g. --index-url for an index with CPU-only torch wheels
# TEST_ARGS  passed to pytest
# LOCK_ARGS  passed to container/lock.py

PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
LOCK_ARGS ?=
UV := uv==0.13.8
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(CURDIR)/build/demo
TORCH := torch==2.13.0
BUILD_REQUIREMENTS := "scikit-build-core>=0.11,<2" "cmake>=3.28,<5" ninja executorch==1.5.1

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint lock clean setup

# The answer is the last thing on stdout; what is being done goes to stderr.
demo: export G4_HOME := $(DEMO)
demo: setup
	@$(BIN)/g4 pull demo --force >&2
	@$(BIN)/g4 quantize --force >&2
	@$(BIN)/g4 export --force >&2
	@echo 'g4 run --prompt "What is the capital of France?" --temperature 0' >&2
	@$(BIN)/g4 run --prompt "What is the capital of France?" --temperature 0

# One thread per process: two test processes share two cores without fighting for them.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: setup
	$(BIN)/pip install --quiet $(PIP_ARGS) $(UV)
	$(BIN)/python container/lock.py $(LOCK_ARGS)

clean:
	rm -rf $(VENV) build dist

setup: $(VENV)/.g4

# torch comes first and alone: it is the largest part and changes least.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "error: there is no C++ compiler; install g++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: cannot make an environment; install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet $(PIP_ARGS) $(TORCH) >&2
	@touch $@

$(VENV)/.g4: $(VENV)/.torch pyproject.toml $(shell find runner -type f)
	$(BIN)/pip install --quiet $(PIP_ARGS) $(BUILD_REQUIREMENTS) >&2
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-build-isolation --editable '.[test]' >&2
	@touch $@
