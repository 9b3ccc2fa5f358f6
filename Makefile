# `make demo` compiles the shipped checkpoint, `make test` runs the tests, `make test-all` the slow ones too. All install
# what they need into .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# Tests start hundreds of processes: without byte code on disk each would compile all of torch that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check install clean

# Installed anew when the project's requirements change.
$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	# setuptools warns at every editable install that the folder is named as the package; it is meant to be.
	# Python compiles what is imported; pip would compile ten times as much.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/asapc compile models/digits.pt --out digits.asap --force

# A worker takes up to 2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info *.asap
