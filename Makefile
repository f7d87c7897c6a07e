# make demo: set up everything and do the main job. make test: set up everything and run the tests.
# make docs: the documentation as a site in site/, which is read from the disk; a warning is an error.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test dist lint docs check

demo: $(VENV)/.ready
	$(BIN)/vmoe demo $(if $(SOURCE),--source "$(SOURCE)")

test: $(VENV)/.ready
	$(BIN)/pytest -n auto --dist loadfile

# The wheel and the sdist in dist/, checked, and installed into an environment of their own.
dist: $(VENV)/.ready
	$(BIN)/python benchmarks/installed.py --quick --dist dist

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the theme says of mkdocs 2, which is not installed, is no warning of ours.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint docs test

# Whatever a failed attempt left in .venv is replaced; a VENV of your own is never cleared.
CLEAR = $(if $(filter .venv,$(VENV)),--clear)

# A torch that PYTHON has is taken as it is, be it installed in the system or in a virtual
# environment that is active; else TORCH is installed, before what would fetch another.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "vmoe needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(CLEAR) $(VENV)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "taking the torch that is installed"; \
	  $(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	    > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"; \
	else $(BIN)/pip install -q $(TORCH); fi
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install -q -e ".[cpu,openvino,train,dev]"
	$(BIN)/pip install -q --no-deps torchattacks==3.5.1
	@touch $@
