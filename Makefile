# make run   the main job: predictions for DeepSeek-R1 on CloudMatrix384 and an expert placement,
#            as tables, plots and a page in out/
# make test  the test suite but for its slow tests; make test-slow runs those, test-all both
# make docs  the manual, as a site in out/manual/
# Each makes its own .venv first. A Python of at least 3.12 is looked for; name one with PYTHON=...

VENV ?= .venv
BIN := $(VENV)/bin
FIND_PYTHON := for p in $(PYTHON) python3.12 python3.13 python3.14 python3 python \
	$$(ls -d $$HOME/.pyenv/versions/3.1[2-9]*/bin/python 2>/dev/null); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done

# make fuzz  files and options of any content, FUZZ examples of each kind (docs: SECURITY.md)
FUZZ ?= 3000

.PHONY: run test test-slow test-all fuzz lint bench docs clean
.DEFAULT_GOAL := run

run: $(VENV)/.installed
	$(BIN)/python -m studies.main_job --out out

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow --durations=30

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

fuzz: $(VENV)/.installed-test
	CMJAX_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n auto --dist worksteal tests/fuzz

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.price_speed

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open out/manual/index.html"

$(VENV)/bin/python:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	  echo "cmjax needs Python 3.12 or newer (Python 3.11 stops at a JAX that miscompiles on CPU)."; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; fi; \
	echo "using $$python ($$($$python --version))"; \
	$$python -m venv $(VENV)

# Installing compiles the kernels, where there is a C++ compiler; the last line says how that went.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(wildcard cmjax/native/csrc/* cmjax/native/build.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@$(BIN)/python -m cmjax.native
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed mkdocs.yml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache
