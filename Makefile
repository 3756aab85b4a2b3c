# Every target makes VENV when it is missing and brings it up to date when the requirements changed.
# Another interpreter: make test PYTHON=python3.12 VENV=.venv-3.12
# Another jax than the one for what is found: make install ACCELERATOR=cpu, cuda12, cuda13 or tpu

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/reproduce
FOUND := $(shell $(PYTHON) olmoe_jax/accelerator.py)
ACCELERATOR ?= $(or $(firstword $(subst :, ,$(FOUND))),cpu)
ifeq ($(filter cpu cuda12 cuda13 tpu,$(ACCELERATOR)),)
$(error ACCELERATOR=$(ACCELERATOR): write cpu, cuda12, cuda13 or tpu)
endif
JAX := $(if $(filter cpu,$(ACCELERATOR)),jax,"jax[$(ACCELERATOR)]")
RUNTIME := $(VENV)/runtime-$(ACCELERATOR).stamp
DEV := $(VENV)/dev-$(ACCELERATOR).stamp
PYTEST := $(VENV)/bin/python -m pytest -q -n 2 --durations 30
# XLA fixes the number of a CPU's devices when jax starts: these tests run in a session of their own.
PYTEST_DEVICES := XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu $(PYTEST) \
    --dist loadfile --no-loadscope-reorder tests/eight_devices
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt
# pip compiles on one core, and a third more files: packages' tests and transformers' other models.
COMPILE := $(VENV)/bin/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/(?!auto|olmo)' $(VENV)/lib

.PHONY: install quickstart reproduce lint test test-slow test-devices test-golden test-compilers test-serving test-all

install: $(RUNTIME)

quickstart: $(RUNTIME)
	$(VENV)/bin/python -m olmoe_jax.quickstart

# The paper's table, docs/reproduce.md; a small model on a CPU: make reproduce ARGS=--small
reproduce: $(RUNTIME)
	$(VENV)/bin/python -m eval.reproduce --output $(OUTPUT) $(ARGS)

test: $(DEV)
	$(PYTEST) --dist loadfile -m "not slow and not golden and not exhaustive"

test-slow: $(DEV)
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "slow and not exhaustive and not compilers"

test-devices: $(DEV)
	$(PYTEST_DEVICES) -m "not exhaustive"

# The numbers of the PyTorch reference, which lie in OLMOE_JAX_SHARED.
test-golden: $(DEV)
	$(PYTEST) -m golden tests/convert

# Compilers of devices that are not there, in an environment of their own: jax would look for the devices.
# What shares a compiled program is one group.
test-compilers: $(DEV)
	$(PIP) -r requirements-compilers.txt
	JAX_PLATFORMS=cpu $(PYTEST) --dist loadgroup -m compilers

# Servers' greedy tokens against ours, of the servers that SERVERS names (docs/serving.md):
# make test-serving SERVERS="--transformers5 PYTHON --vllm PYTHON"
test-serving: $(DEV)
	$(VENV)/bin/python -m benchmarks.serving $(SERVERS)

# What a release runs.
test-all: lint test test-slow test-devices test-golden
	if [ -n "$(SERVERS)" ]; then $(MAKE) test-serving; fi
	$(PYTEST) --dist loadfile -m exhaustive
	$(PYTEST_DEVICES) -m exhaustive
	if [ -n "$$OLMOE_JAX_SHARED" ]; then \
	    $(VENV)/bin/python "$$OLMOE_JAX_SHARED/tools/check_reference.py"; fi
	$(MAKE) test-compilers VENV=.venv-compilers
	$(MAKE) test-compilers PYTHON=python3.12 VENV=.venv-compilers-3.12
	$(MAKE) test PYTHON=python3.12 VENV=.venv-3.12

lint: $(DEV)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

$(RUNTIME): requirements.txt constraints.txt | $(VENV)/bin/python
	@echo "this machine has $(wordlist 2,99,$(FOUND)):"
	@echo "installing requirements.txt and jax for $(ACCELERATOR) into $(VENV) (a few minutes the first time)"
	$(PIP) -r requirements.txt $(JAX)
	@$(COMPILE) || true
	@touch $@

# The development requirements contain the runtime ones, hence both stamps.
$(DEV): requirements.txt requirements-dev.txt constraints.txt | $(VENV)/bin/python
	@echo "this machine has $(wordlist 2,99,$(FOUND)):"
	@echo "installing requirements-dev.txt and jax for $(ACCELERATOR) into $(VENV) (a few minutes the first time)"
	$(PIP) -r requirements-dev.txt $(JAX)
	@$(COMPILE) || true
	@touch $(RUNTIME) $@

# A .venv without pip would fail ever after: leave none behind.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: olmoe_jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is none, or does not run: write e.g. make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
