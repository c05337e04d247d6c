# Two commands do everything, each creating its own virtual environment when there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCE := mergekit_bert tests benchmarks examples

.PHONY: quickstart test lint types wheel clean

quickstart: $(VENV)/demo  ## install, then the main job on the embedded default encoder
	$(BIN)/mbert quickstart

test: lint types  ## install, lint, types, tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/test
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/ruff format --check $(SOURCE)

types: $(VENV)/test
	$(BIN)/mypy

wheel: $(VENV)/test  ## build dist/*.whl
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache

# torch goes first and alone: it alone decides which build comes with it.
$(VENV)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[test]'
	touch $@
