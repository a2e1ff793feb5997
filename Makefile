# Every target sets up what it needs: a fresh machine has only Python >= 3.10, git and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check soak bench exactness format clean

demo: $(READY)            ## draw a picture with two CPU ranks and show the daemon's status
	$(BIN)/xditctl demo

test: $(READY)            ## the tests, against real daemons with real ranks
	$(BIN)/python -m pytest

check: $(READY)           ## format, lint, types; the layering test is part of make test and of this
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

soak: $(READY)            ## what is too long for make test: long lives and deaths, and every family under every plan
	$(BIN)/python -m pytest -m soak

bench: $(READY)           ## the hand-off beside its peers, as ratios (installs ray)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[ray]"
	$(BIN)/python -m bench.handoff

exactness: $(READY)       ## compares with ComfyUI, COMFYUI="CHECKOUT=PYTHON …", and writes docs/exactness.md
	$(BIN)/python -m tests.comfy.exactness $(COMFYUI) --write
	$(BIN)/python -m tests.rank.exactness --write
	$(BIN)/python -m tests.rank.holding --write
	$(BIN)/python -m tests.models.rounding --write

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "xditd needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[daemon,test]"
	touch $(READY)
