# One command per task. Needs Python 3.10-3.13; uses uv where it is installed, else venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

TESTS ?= tests

.PHONY: help demo test test-all ring check docs format setup clean
help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/'

demo: $(VENV)/.demo  ## set up, then train a teacher, a student alone and a distilled student on drawn shapes; continues a stopped demo
	$(BIN)/python train.py
	@echo "Before these commands, type: source $(VENV)/bin/activate"

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/.dev  ## set up, then run the tests, but not the exhaustive ones
	$(PYTEST) -m "not exhaustive" $(TESTS)

test-all: $(VENV)/.dev  ## run all tests; with PART=2/7, that part of the exhaustive ones
	$(PYTEST) $(if $(PART),-m exhaustive --part $(PART)) $(TESTS)

RING ?= 3.10 3.13
# An environment takes 6 GB of disk, so it goes as soon as its tests have passed.
ring:  ## the unit tests on the oldest and the newest Python
	@for version in $(RING); do \
	  if python=$$(.ci/find-python $$version); then \
	    echo "ring: unit tests on $$python"; ran="$$ran $$version"; \
	    $(MAKE) test VENV=.venv-$$version PYTHON=$$python TESTS=tests/unit || exit 1; rm -rf .venv-$$version; \
	  else missing="$$missing $$version"; fi; \
	done; \
	if [ -n "$$ran" ]; then echo "ring: the unit tests passed on Python$$ran"; fi; \
	if [ -n "$$missing" ]; then echo "ring: NOTHING RAN on Python$$missing: not found on PATH, in pyenv or in uv"; fi; \
	if [ -z "$$ran" ] && [ "$$CI" = true ]; then exit 1; fi

check: $(VENV)/.dev docs  ## format, lint, types, layers and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev  ## build the documentation site in build/docs; a warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

format: $(VENV)/.dev  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/nbstripout notebooks/*.ipynb

setup: $(VENV)/.dev  ## everything a developer needs

$(BIN)/python:
ifdef UV
	uv venv --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif

define install
$(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install) -e "$(1)"
endef

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(call install,.)
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	touch $@ $(VENV)/.demo

clean:  ## remove caches and the environment, never outputs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
