# Each target makes the virtual environment it needs: Python 3.10 or newer, pip and make are enough to start.
#
#   make demo                         prune a small model, offline, and print what came of it
#   make test WORKERS=1 ARGS="-k nm"  the everyday tests, with fewer workers or fewer tests
#   make test-all                     every test
#   make check PYTHON=python3.12 VENV=.venv312

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARGS    ?=

PY    := "$(VENV)/bin/python"
STAMP := $(VENV)/.installed
TESTS  = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup --max-worker-restart 0
REST  := browser or crash or distributed or matrix
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-rest test-pages test-all lint types docs dist compat check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  Settings: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) ARGS=\"more words for pytest or the demo\""
	@echo "  The CPU build of torch, on Linux: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test"

demo: $(STAMP)  ## prune a small model, offline
	"$(VENV)/bin/hf-prune" demo $(ARGS)

test: $(STAMP)  ## the everyday tests, in parallel
	$(TESTS) -m "not (docs or $(REST))" $(ARGS)

test-rest: $(STAMP)  ## the tests marked browser, crash, distributed or matrix
	$(TESTS) -m "$(REST)" $(ARGS)

test-pages: $(STAMP)  ## the tests marked docs: every page and notebook from start to end, and the wheel
	$(TESTS) -m docs $(ARGS)

test-all: $(STAMP)  ## every test
	$(TESTS) $(ARGS)

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)  ## mypy
	$(PY) -m mypy

docs: $(STAMP)  ## the documentation, as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "Built build/site/index.html"

dist: $(STAMP)  ## wheel and sdist, in dist
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist .

# Other releases, or more packages, in front of everything else that is installed.
compat: $(STAMP)  ## a short test with the oldest and the newest transformers and datasets; ExecuTorch's tests
	@for name in oldest newest executorch; do \
	    venv="$(VENV)-$$name"; \
	    case "$$name" in \
	        executorch) tests="-n $(WORKERS) -k executorch tests/conversion/test_export.py" ;; \
	        *) tests="tests/test_compatibility.py" ;; \
	    esac; \
	    $(PY) -m venv --clear --without-pip "$$venv" && \
	    $(PY) -m pip --python "$$venv/bin/python" install --quiet --no-deps --requirement "tests/$$name.txt" && \
	    $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$venv/dependencies.pth" && \
	    mv "$$venv/dependencies.pth" \
	        "$$("$$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	    echo "With $$name: $$(grep == "tests/$$name.txt" | paste -sd ' ')" && \
	    OMP_NUM_THREADS=1 "$$venv/bin/python" -m pytest -q -W default $$tests || exit 1; \
	done

check: lint types test  ## lint, types and test

clean:  ## remove .venv, caches and build products
	rm -rf .venv .venv-oldest .venv-newest .venv-executorch .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
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
