# make demo: install, evolve adapters on the embedded model, show what came of it.   make test: install, run the tests.
# Needs python 3.11 or newer, make and a C compiler. `make help` lists the rest.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DETECTED = $(shell if nvidia-smi -L >/dev/null 2>&1 || /usr/lib/wsl/lib/nvidia-smi -L >/dev/null 2>&1; \
	then echo gpu; else echo cpu; fi)
# cpu and gpu exclude each other: both bring vLLM. What was installed stays until EXTRA= says otherwise.
ifndef EXTRA
EXTRA := $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),$(DETECTED))
endif
INSTALLED := $(VENV)/.installed-$(EXTRA)
PIP_FLAGS := --disable-pip-version-check --quiet --progress-bar off
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install nodeps demo test check format gpu soak bench lab ui clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with pinned dependencies (cpu or gpu, by looking for an NVIDIA driver)

$(INSTALLED): pyproject.toml requirements/constraints.txt requirements/no-deps-$(EXTRA).txt
	@test -n "$(PYTHON)" || { echo "agentlab needs Python 3.11, 3.12 or 3.13; set it with: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) ($(EXTRA); 6 to 10 GB of disk, some minutes) ..."
	@# anew for the other extra, or what one that was interrupted left: pip would keep its vLLM and its build of torch
	@$(PYTHON) -m venv $(if $(filter-out $@,$(wildcard $(VENV)/.install*)),--clear) $(VENV)
	@touch $(VENV)/.installing
	@$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=25,<27'
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements/constraints.txt -e '.[$(EXTRA),dev]'
	@$(MAKE) --no-print-directory nodeps EXTRA=$(EXTRA) PYTHON=$(BIN)/python
	@rm -f $(VENV)/.install* && touch $@

nodeps:  ## install what must come without its declared dependencies
	@$(PYTHON) -m pip install $(PIP_FLAGS) --no-deps -r requirements/no-deps-$(EXTRA).txt

demo: install  ## evolve adapters on the embedded model and show the result
	@$(BIN)/agentlab models prepare
	@$(BIN)/agentlab evolve experiments/demo.yaml

test: install  ## run the tests, the fast ones first
	@$(BIN)/python -m pytest -m "not soak and not gpu"

check: install  ## format, lint and types, as they have to be in every commit
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/nbstripout --verify notebooks/*.ipynb

format: install  ## bring the code into form
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/nbstripout notebooks/*.ipynb

gpu: install  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

soak: install  ## the long tests
	@$(BIN)/python -m pytest -m soak

bench: install  ## every claim of speed, measured; each prints one JSON line
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

lab: install  ## open JupyterLab
	@$(BIN)/jupyter lab notebooks

ui: install  ## open MLflow on the demo's store
	@$(BIN)/agentlab ui experiments/demo.yaml

clean:  ## remove .venv and caches; runs and the MLflow store stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
