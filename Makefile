# Everything a newcomer needs: each target sets up .venv by itself and is quick once it is there.

PYTHON ?= python3
ARGS ?=
ACCELERATOR ?= cpu
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Batched SVD is many times slower on small CPUs when BLAS threads compete with JAX's.
export OPENBLAS_NUM_THREADS ?= 1

# On an accelerator the example that uses all its devices, with the JAX that is built for it.
EXAMPLE := $(if $(filter cpu,$(ACCELERATOR)),pretrain,sharded)
PACKAGES := examples$(addprefix -,$(filter-out cpu,$(ACCELERATOR)))
$(if $(filter cpu gpu cuda12 tpu,$(ACCELERATOR)),,$(error ACCELERATOR is cpu, gpu, cuda12 or tpu))

.DEFAULT_GOAL := help
.PHONY: help train test test-all mutants bench lint docs docs-serve dist

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; \
	do printf '  make %-10s %s\n' "$$target" "$$text"; done

train: $(VENV)/.$(PACKAGES) ## train a small Llama; ARGS="--help" lists settings, ACCELERATOR=gpu or tpu
	@$(BIN)/python examples/pretraining/$(EXAMPLE).py $(ARGS)

test: $(VENV)/.test ## run the quick tests
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.test ## run all tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

mutants: $(VENV)/.test ## plant faults and check that the quick tests fail; ARGS="engine" for one module
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(VENV)/.bench ## time a small model's updates beside Optax's, into runs/step.json
	@mkdir -p runs
	$(BIN)/python benchmarks/speed/bench_step.py --trees tiny --dtype float32 --out runs/step.json \
		--methods adamw,galore,natural_galore,contrib_galore $(ARGS)

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

docs: $(VENV)/.docs ## build the documentation site into docs/_build/html; a broken link fails
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html $(ARGS)

docs-serve: docs ## show the site at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html

dist: $(VENV)/.package ## build sdist and wheel into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# One stamp for each extra of pyproject.toml, so that `make train` installs no test tools.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "installing the packages for $* into $(VENV) ..."
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(BIN)/python -m pip install --quiet --editable '.[$*]'; \
	elif $(PYTHON) -m pip --python $(BIN)/python --version >/dev/null 2>&1; then \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[$*]'; \
	elif command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python --editable '.[$*]'; \
	else \
		echo "error: neither pip 22.3 or newer nor uv is there to install packages with" >&2; exit 1; \
	fi
	@touch $@

# A distribution's Python may come without ensurepip: then the venv borrows $(PYTHON)'s own pip.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is no Python 3.11 or newer; name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear --without-pip $(VENV) >/dev/null 2>&1 \
		|| { echo "error: $(PYTHON) cannot make virtual environments: install its venv module" >&2; exit 1; }
