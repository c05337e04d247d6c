# Two commands do everything, each creating the virtual environment when there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV     := uv==0.13.9
SOURCE := mergekit_bert tests benchmarks examples docs

.PHONY: quickstart test lint types wheel lock clean

quickstart: $(VENV)/installed  ## install, then the main job on the embedded default encoder
	$(BIN)/mbert quickstart

test: lint types  ## install, lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/ruff format --check $(SOURCE)

types: $(VENV)/installed
	$(BIN)/mypy

wheel: $(VENV)/installed  ## build dist/*.whl
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache

# The lock goes first: then of all that torch needs, only its CUDA libraries are left for pip to choose.
$(VENV)/locked: requirements.lock constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) -c constraints.txt torch
	touch $@

$(VENV)/installed: $(VENV)/locked pyproject.toml
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

lock: constraints.txt  ## requirements.lock: every pin but torch, with the hashes of all its files in the package index
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	grep -v '^torch==' constraints.txt > build/lock/pins.txt
	build/lock/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate \
		--output-file build/lock/hashes.txt build/lock/pins.txt
	{ printf '%s\n' \
		'# Made by `make lock` from constraints.txt; docs/updating.md. Linux and macOS, Python 3.11 and later. Install:' \
		'#   pip install --require-hashes --no-deps -r requirements.lock' \
		'#   pip install -c constraints.txt torch' \
		'# torch and its CUDA libraries are not here: which build comes, with which bytes, depends on the machine.'; \
	  cat build/lock/hashes.txt; } > requirements.lock
