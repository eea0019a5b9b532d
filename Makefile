# Everything on a machine that has Python (3.11 or newer) and make:
#   make demo   install into .venv, then prune a small network and print a table
#   make test   install with the test extra, then lint, import contracts, types, tests
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported; most of what is installed never is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test check pytest sanitize install install-test clean

demo: install
	$(BIN)/lossprune demo

# Both at once, as a check takes one core.
test: install-test
	@$(MAKE) --no-print-directory -j2 check pytest

pytest: install-test
	$(BIN)/pytest -n 3 --dist worksteal -q -rs --durations 15

check: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m tests.report.script_lint

# Compiled files must not read or write out of bounds: minutes, with gcc.
sanitize: install-test
	.ci/sanitize

install: .venv/installed
install-test: .venv/installed-test

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e . -c constraints.txt
	@touch $@

.venv/installed-test: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]' -c constraints.txt
	@touch $@ .venv/installed

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
