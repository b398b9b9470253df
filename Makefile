# make run    install once, then the whole chain on the model and text that come with the package
# make test   install once, then the tests
# Linux without a GPU: PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' saves gigabytes of CUDA.

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run test check bench docs clean

help:
	@echo "make setup   create .venv and install everything the project needs, pinned by constraints.txt"
	@echo "make run     the quickstart chain into runs/quickstart; nothing is downloaded but packages"
	@echo "make test    the tests (WORKERS=$(WORKERS) processes)"
	@echo "make check   lint, formatting, types, and whether the generated pages of docs/ are up to date"
	@echo "make bench   every script in benchmarks/; they print the numbers the docs quote"
	@echo "make docs    write the generated pages and build the site into build/site"
	@echo "make clean   remove .venv, caches and build leftovers; runs/ stays"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

run: setup
	$(BIN)/minitron run quickstart --out runs/quickstart

# One thread per worker: the models are tiny, and threads that wait for each other would cost more than they give.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m docs.generate --check

bench: setup
	@set -e; for script in distill_step head_loss importance_pass importance_scale prune_scale robots_verdicts audit_speed threads; do $(BIN)/python -m benchmarks.$$script; echo; done

docs: setup
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
