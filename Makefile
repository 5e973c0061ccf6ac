# Needs Python 3.11+, make and git; everything else comes from here.
#   make quickstart   set up, then run the main job
#   make test         set up, then check and test        make test-all   the long matrices too
#   make docs         build the documentation site
PYTHON ?= python3
# The release that docs/benchmarks.md was measured with; users may have a newer one.
TORCH ?= torch<2.14
BIN := .venv/bin
STAMP := .venv/.installed

# Three on two cores: some of them wait, for sockets and for processes.
UNIT = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal tests/unit

.PHONY: install packages quickstart test test-all check unit docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,4s/^# *//p' Makefile

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorafleet needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' '$(TORCH)'
	mkdir -p .venv/namespace && ln -sfn ../.. .venv/namespace/lorafleet
	@touch $(STAMP)

install: $(STAMP)

quickstart: install
	$(BIN)/lorafleet sweep examples/quickstart.yaml

check: install
	scripts/check

packages:
	scripts/test-packages

unit: install packages
	$(UNIT) -m 'not long'

# The checks first, then the tests without Ray, then those with it; all that is needed is installed above.
test: check unit
	$(BIN)/python -m pytest -q tests --ignore=tests/unit -m 'not long' --durations 25

test-all: check install packages
	$(UNIT) --hypothesis-profile thorough
	$(BIN)/python -m pytest -q tests --ignore=tests/unit

# The site, in build/site.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
