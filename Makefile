# remix-bids: `make demo` shows it at work, `make test` checks it; both set everything up first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

# The user's own data for `make demo`; without them a simulated scan is used.
BIDS ?=
OUT  ?=
ARGS ?=
# The real sets for `make test-data`.
DATA ?= ../shared/data

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-data test-browser container-test evidence lint clean

help:
	@echo "make demo                      a simulated thick-slice scan, with figures of merit (no data needed)"
	@echo "make demo BIDS=/data OUT=/out  your own BIDS dataset (more options of remix-bids: ARGS='...')"
	@echo "make test                      ruff, mypy and all tests that need no data"
	@echo "make test-data DATA=DIR        the app on real scans"
	@echo "make test-browser              reports in a real browser (needs chromium and chromedriver)"
	@echo "make lint                      ruff and mypy only"
	@echo "make venv                      only set up $(VENV)"
	@echo "make evidence DATA=DIR         measure the experts on the real sets again (hours)"
	@echo "make container-test            build the container image and check it (podman or docker; docker/test.sh)"
	@echo "make clean                     remove what make and the demo have made"
	@echo "TORCH_INDEX=URL                take torch from there, PYTHON=python3.12: use this Python"

venv: $(READY)

# torch goes first and alone, so that an index for it serves nothing else.
$(READY): requirements.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "remix-bids needs Python 3.11 to 3.13; name one: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up $(VENV); the first time this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		"$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(READY)

ifeq ($(strip $(BIDS)),)
demo: $(READY)
	$(BIN)/remix-experts simulate demo
	$(BIN)/remix-bids demo/bids demo/out participant -w demo/work \
		--output-spaces MNI152NLin2009aSym --offline $(ARGS)
	@$(BIN)/remix-experts compare demo
else
demo: $(READY)
	@test -n "$(OUT)" || { echo "name the folder for the results: make demo BIDS=$(BIDS) OUT=/out"; exit 2; }
	$(BIN)/remix-bids "$(BIDS)" "$(OUT)" participant $(ARGS)
endif

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: with more they wait for each other on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not data and not browser" --durations=5

test-data: $(READY)
	@test -d "$(DATA)/clinical" || { echo "$(DATA) holds no clinical/; name the folder of the real sets: make test-data DATA=..."; exit 2; }
	REMIX_BIDS_TEST_DATA="$(DATA)" $(BIN)/python -m pytest -m data tests/test_data.py --durations=5

# Reports of real scans, too, with PAGES=DIR: an output folder of remix-bids.
PAGES ?=
test-browser: $(READY)
	REMIX_BIDS_TEST_PAGES="$(PAGES)" $(BIN)/python -m pytest -m browser tests/test_browser.py

# The model card's figures, with the experts that ship; hours, and nothing goes into the repository.
EVIDENCE ?= scratch/evidence
evidence: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" benchmarks/evidence.sh "$(DATA)" "$(EVIDENCE)"

container-test:
	docker/test.sh

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
