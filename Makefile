# Every target sets up its environment first, which takes a minute the first time and nothing after that.

PYTHON      ?= python3
EXTRAS      ?= torch,jax,demo,dev
# A file's tests stay in one worker, which keeps what it compiled.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
ARGS        ?=
ENGINE      ?= torch
SHARE       ?= 0/1
# SYSTEM_SITE_PACKAGES=1: use the packages that PYTHON already has (a system image's torch and jax), in a venv apart.
SYSTEM_SITE_PACKAGES ?=

# Tests and benchmarks import the same packages in many processes: let the first of them keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

VENV  := .venv$(if $(SYSTEM_SITE_PACKAGES),-system)
BIN   := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRAS)

.PHONY: help setup test lint unit test-long mutants costs format demo bench docs gpu clean distclean
.DEFAULT_GOAL := help

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
	@echo
	@echo "Settings: PYTHON=python3.12  PYTEST_ARGS='-n 2 -k NAME'  ARGS='--steps 10' (demo)  EXTRAS=torch,dev"
	@echo "          SYSTEM_SITE_PACKAGES=1 (test with the packages that PYTHON has, unpinned and offline if need be)"

$(READY): pyproject.toml constraints.txt scripts/bootstrap.py
	@$(PYTHON) scripts/bootstrap.py $(if $(SYSTEM_SITE_PACKAGES),--system-site-packages) $(VENV) $(EXTRAS)
	@touch $@

setup: $(READY) ## create the virtual environment, if it is not there yet

# A machine's own packages are for running the tests with: linters and warnings judge by the pinned versions alone.
test: $(READY) ## run the linters and the fast tests, side by side: all that is claimed, in ten to fifteen minutes on two cores
	@$(MAKE) --no-print-directory -j2 $(if $(SYSTEM_SITE_PACKAGES),,lint) unit

# Pyright's wrapper would ask the network for a newer release on every run.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(READY) ## run ruff and pyright
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m pyright

# The test processes share the machine: one thread each, and no process takes a whole GPU for itself.
unit test-long: export OMP_NUM_THREADS := 1
unit test-long: export XLA_PYTHON_CLIENT_PREALLOCATE := false
unit: $(READY) ## run the fast tests and doctests
	$(BIN)/python -m pytest $(if $(SYSTEM_SITE_PACKAGES),-W default) $(PYTEST_ARGS)

# What only rarely finds more (tests/README.md): whole products, many random programs, long runs.
test-long: $(READY) ## run the long tests; SHARE=3/10 runs one of ten shares
	$(BIN)/python -m pytest --tier long --share $(SHARE) $(PYTEST_ARGS)

mutants: $(READY) ## make each fault of tests/mutants in a copy, and see that a test finds it; ARGS="--help" says how
	$(BIN)/python -m tests.mutants.run $(ARGS)

costs: $(READY) ## count what the tests take: seconds, processes, compilations, coverage; ARGS="--help" says how
	$(BIN)/python -m tests.costs.run $(ARGS)

format: $(READY) ## format the code and apply ruff's safe fixes
	$(BIN)/python -m ruff check --fix-only
	$(BIN)/python -m ruff format

demo: $(READY) ## train a reversible network and show what it took; ARGS="--help" lists its options
	$(BIN)/python -m revcore demo $(ARGS)

bench: $(READY) ## compare with checkpointing and other libraries; ENGINE=jax for JAX; ARGS="--help" says how
	$(BIN)/python -m benchmarks.$(ENGINE)_engine $(ARGS)

# `make test` builds the site too, into a folder of its own (tests/docs/test_docs.py).
docs: $(READY) ## build the documentation site into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

gpu: $(READY) ## on a machine with a GPU: run the tests that need one; ARGS=torch or ARGS=jax for the benchmarks
	PYTHON=$(BIN)/python scripts/gpu_suite.sh $(or $(ARGS),tests)

clean: ## remove caches, builds and what the demo wrote
	rm -rf build dist demo *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf .venv .venv-system
