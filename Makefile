# make demo    train a small equilibrium model and see what torchdeq does
# make test    the whole test suite, the linter, the formatter's check and the type checker
# make bench   measure the library's speed beside its peers', half an hour on a quiet machine; BENCH="overhead --quick"
#              chooses what, as in: torchdeq bench --help
# make docs    build the documentation into site/; a warning is an error
# make clean   remove the environment and everything that was built
#
# Needs Python 3.11 or later, make and git. All targets share one environment in .venv, which is made once and
# brought up to date when pyproject.toml or constraints.txt has changed. PYTHON=… chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: demo test bench docs clean

demo: $(READY)
	$(BIN)/torchdeq train digits

# What fails quickest comes first. The tests are many small tensors: one thread in each of two processes is
# faster than two threads in one.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The studies set their own number of threads. jax and 0.1.0 come into benchmarks/.cache, not into this environment.
bench: $(READY)
	$(BIN)/torchdeq bench $(BENCH)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without --no-compile, pip compiles all of torch, most of which is never imported; it takes longer than the rest.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "torchdeq needs Python 3.11 or later, and there is no python3 on PATH." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "torchdeq needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Install a newer one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making the environment in $(VENV); this takes some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]" --constraint constraints.txt
	@touch $@
