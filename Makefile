# Two commands for a newcomer, `make demo` and `make test`; each first builds the locked environment in .venv.
# Needs python3 (3.11), a C++ compiler and make. uv comes from PyPI into .uv, Horovod is compiled once and cached.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV := .uv/bin/uv
RUN := $(UV) run --locked --no-sync
.DEFAULT_GOAL := help

.PHONY: help env demo real test lint bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

env: .venv/.locked  ## the locked environment, in .venv

.venv/.locked: pyproject.toml uv.lock .uv/bin/uv
	$(UV) sync --locked --python $(PYTHON) --extra cpu --extra horovod
	@touch $@

.uv/bin/uv:
	@./containers/check_machine.sh "$(PYTHON)"
	@$(PYTHON) -m venv .uv
	@.uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

demo: env  ## a synthetic BBBC021 screen, from raw plates to the report, on two Horovod ranks
	$(RUN) cellhpc synth bbbc021 demo/raw --preset demo
	$(RUN) cellhpc run jobs/demo.toml

test: env  ## the tests
	$(RUN) pytest

lint: env  ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: env  ## every benchmark: a table, and one JSON line
	@set -e; for bench in tests/bench/*.py; do echo "== $$bench"; $(RUN) python $$bench; done
