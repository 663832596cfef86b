# Every command of the project. `make` alone lists them. All that they make is under the checkout.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# Another environment that happens to be active must not leak into this one.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv
export UV_PROJECT_ENVIRONMENT := .venv
export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS := 1

PY := .venv/bin/python
WORKERS ?= 3
STAMP := .venv/.made-for

# The environment is made again when what it was made from is newer, when its interpreter is gone, and when the checkout was moved.
ifneq ($(shell $(PY) -c 'print("works")' 2>/dev/null && cat $(STAMP) 2>/dev/null),works $(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help
help: ## List the targets, a line each
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do printf '  make %-8s %s\n' "$$target" "$$text"; done
	@printf '\nARGS="..." is handed to demo, test and bench, as in: make test ARGS="-k barrier". PYTHON=... chooses the interpreter of a new .venv.\n'

$(STAMP): uv.lock pyproject.toml packages/*/pyproject.toml tools/setup.sh
	@PYTHON='$(PYTHON)' sh tools/setup.sh
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

.PHONY: setup
setup: $(STAMP) ## Make .venv with the workspace and its tools; nothing to do when it is up to date
	@:

.PHONY: demo
demo: $(STAMP) ## Run the main job, examples/quickstart.py, on this machine's network stack
	$(PY) examples/quickstart.py $(ARGS)

.PHONY: test
test: $(STAMP) ## Run all tests, in three processes; WORKERS=0: in this one
	$(PY) -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(ARGS)

.PHONY: check
check: $(STAMP) ## Check format, lint, strict types and the contract on imports
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PY) -m mypy
	$(PY) -m basedpyright
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache

.PHONY: format
format: $(STAMP) ## Format the code, and repair what lint can repair
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: bench
bench: $(STAMP) ## Measure: a table, and a JSON file in benchmarks/results/
	$(PY) benchmarks/run.py $(ARGS)

.PHONY: build
build: $(STAMP) ## Build the source distributions and wheels of all packages into dist/
	.uv/bin/uv build --all-packages --out-dir dist

.PHONY: clean
clean: ## Remove all that these commands made
	rm -rf .venv .uv .cache dist demo-output benchmarks/results .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
