# Every target makes .venv when it is missing and brings it up to date when the requirements changed.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet -c constraints.txt

.PHONY: quickstart test test-slow lint

quickstart: .venv/runtime.stamp
	.venv/bin/python -m olmoe_jax.quickstart

test: .venv/dev.stamp
	.venv/bin/python -m pytest -q -n 2 -m "not slow"

test-slow: .venv/dev.stamp
	.venv/bin/python -m pytest -q -m slow

lint: .venv/dev.stamp
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

.venv/runtime.stamp: requirements.txt constraints.txt | .venv/bin/python
	@echo "installing requirements.txt into .venv (a few minutes the first time)"
	$(PIP) -r requirements.txt
	@touch $@

# The development requirements contain the runtime ones, hence both stamps.
.venv/dev.stamp: requirements.txt requirements-dev.txt constraints.txt | .venv/bin/python
	@echo "installing requirements-dev.txt into .venv (a few minutes the first time)"
	$(PIP) -r requirements-dev.txt
	@touch .venv/runtime.stamp $@

# A .venv without pip would fail ever after: leave none behind.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: olmoe_jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not: write e.g. make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }
