# Everything runs in .venv, which the first target makes. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WEIGHTS ?= voc07-320-resnet18

.PHONY: help demo test test-slow lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       find objects on the photos in examples/, drawn copies in demo-output/"
	@echo "make test       the quick tests"
	@echo "make test-slow  the tests that train and evaluate"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make clean      remove what the others made, the environment included"

demo: $(VENV)/.installed
	$(BIN)/refinedet predict $(WEIGHTS) examples/*.jpg --save demo-output

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The later -m wins over the "not slow" of pyproject.toml.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow --timeout 3600 $(SLOW_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo-output dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an installation that was interrupted is done again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev,tensorboard,timm,export,int8,video,track]'
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
