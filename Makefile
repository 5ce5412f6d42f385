# Each target makes the virtual environment it needs: Python 3.10 or newer, pip and make are enough to start.
#
#   make demo                         prune a small model, offline, and print what came of it
#   make test WORKERS=4 ARGS="-k nm"  the everyday tests, with more workers or fewer tests
#   make test-all                     every test
#   make check PYTHON=python3.12 VENV=.venv312

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

PY    := "$(VENV)/bin/python"
STAMP := $(VENV)/.installed
TESTS  = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup
REST  := browser or crash or distributed or matrix
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-rest test-all lint types check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s  %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  Settings: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) ARGS=\"more words for pytest or the demo\""
	@echo "  The CPU build of torch, on Linux: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test"

demo: $(STAMP)  ## prune a small model, offline
	"$(VENV)/bin/hf-prune" demo $(ARGS)

test: $(STAMP)  ## the everyday tests, in parallel
	$(TESTS) -m "not ($(REST))" $(ARGS)

test-rest: $(STAMP)  ## the tests marked browser, crash, distributed or matrix
	$(TESTS) -m "$(REST)" $(ARGS)

test-all: $(STAMP)  ## every test
	$(TESTS) $(ARGS)

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)  ## mypy
	$(PY) -m mypy

check: lint types test  ## lint, types and test

clean:  ## remove .venv, caches and build products
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# `make -j clean test` must not delete what it is installing.
ifneq ($(filter clean,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif

# The stamp holds the folder it was made for: in a copied or moved checkout the installation is renewed, since it
# would otherwise import the package from the old place.
STAMPED := $(shell cat "$(STAMP)" 2>/dev/null)
ifneq "$(STAMPED)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@rm -f "$(STAMP)"
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "No '$(PYTHON)' found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "'$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), hf_prune needs Python 3.10 or newer:" \
	         "name another one: make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(PY) || "$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	    echo "'$(PYTHON)' cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "[1/2] torch into $(VENV) (the CPU build is 200 MB, the CUDA build several GB; only once)"
	@$(PIP) torch
	@echo "[2/2] hf_prune with its demo and its tools, versions from constraints.txt (300 MB, about a minute)"
	@$(PIP) --editable ".[demo,dev]"
	@echo "$(CURDIR)" > "$(STAMP)"
