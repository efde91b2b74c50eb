# make run: try nbdsnap.  make test: everything, as CI does.  Nothing has to be installed before but Python 3.11.

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
export PYTHON

SOURCES := nbdsnap tests benchmarks

# Three tests at a time: most of them wait for a disk, a kernel or a client.  JOBS=0 runs them one by one.
JOBS   ?= 3
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help run test quick lint format bench conformance-peers clients clean

help:
	@echo "make run     serve a demo volume on 127.0.0.1:10809, and say what to do with it"
	@echo "make test    lint, then every test, with the real clients"
	@echo "make quick   lint, then the tests that take less than a minute"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the source"
	@echo "make bench   measure against other servers, side by side"
	@echo "make conformance-peers   hold them and nbdsnap to the protocol, side by side"

# A stamp for each kind of installation: done again only when pyproject.toml has changed.
$(VENV)/installed: pyproject.toml .ci/make-venv
	.ci/make-venv $(VENV)
	@touch $@

$(VENV)/installed-dev: pyproject.toml .ci/make-venv
	.ci/make-venv $(VENV) dev
	@touch $@ $(VENV)/installed

run: $(VENV)/installed
	@$(BIN)/nbdsnap demo demo

test: lint clients
	$(PYTEST) --durations=15 tests

quick: lint
	$(PYTEST) -m 'not slow' --durations=5 tests/unit tests/model

lint: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/installed-dev clients
	$(BIN)/python -m benchmarks

conformance-peers: $(VENV)/installed-dev clients
	$(BIN)/python -m tests.conformance --peers

clients:
	@.ci/install-test-packages

clean:
	rm -rf $(VENV) build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
