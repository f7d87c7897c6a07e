# make demo: set up everything and do the main job. make test: set up everything and run the tests.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check lint clean

demo: $(VENV)/.ready
	$(BIN)/vmoe demo $(if $(SOURCE),--source "$(SOURCE)")

test: $(VENV)/.ready
	$(BIN)/pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# A torch that is installed already is taken as it is; else TORCH is installed, before what needs it.
$(VENV)/.ready: pyproject.toml
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  echo "taking the torch that is installed"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -e ".[cpu,train,dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo
