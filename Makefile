# Two commands for a newcomer, `make demo` and `make test`. Each first builds the locked environment in .venv: uv comes
# from PyPI into .uv, and Horovod is compiled once (uv keeps it). Needed: Python 3.11, a C++ compiler and make.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
IN_VENV := .venv/bin/
.DEFAULT_GOAL := help

.PHONY: help env machine demo real container test lint bench

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

env: .venv/.locked  ## the locked environment, in .venv

.venv/.locked: pyproject.toml uv.lock
	@$(MAKE) --no-print-directory machine .uv/bin/uv
	.uv/bin/uv sync --locked --compile-bytecode --python "$(PYTHON)" --extra cpu --extra horovod
	@touch $@

.uv/bin/uv:
	@rm -rf .uv && "$(PYTHON)" -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 || { rm -rf .uv; exit 1; }

machine:  ## is there what the environment is built with?
	@test -n "$(PYTHON)" || { echo "cellhpc needs Python 3.11, and there is no python3 here. Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "cellhpc needs Python 3.11; $(PYTHON) is $$("$(PYTHON)" --version 2>/dev/null || echo no Python). Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "cellhpc needs Python's venv module; $(PYTHON) lacks it. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "cellhpc compiles Horovod and needs a C++ compiler; there is no $(CXX). On Debian: apt-get install g++" >&2; exit 1; }

demo: env  ## a synthetic BBBC021 screen, from raw plates to the report, on two Horovod ranks
	$(IN_VENV)cellhpc synth bbbc021 demo/raw --preset demo
	$(IN_VENV)cellhpc run jobs/demo.toml

real: env  ## the 660 real BBBC021 fields in $CELLHPC_DATA, pre-trained against Xavier
	$(IN_VENV)cellhpc run jobs/bbbc021_subset.toml

container:  ## the CPU image for Apptainer: containers/cellhpc-cpu.sif
	containers/build.sh cpu

test: env  ## the tests, two files at a time
	$(IN_VENV)pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: env  ## ruff and mypy
	$(IN_VENV)ruff check .
	$(IN_VENV)ruff format --check .
	$(IN_VENV)mypy

bench: env  ## every benchmark: a table, and one line of JSON
	@set -e; for bench in tests/bench/*.py; do echo "== $$bench"; $(IN_VENV)python $$bench; done
