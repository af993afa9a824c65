# A thin face over `python -m pipeline | train | evaluate`. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo tile cache train sample evaluate report test test-full lint bench clean

PYTHON ?= python3
VENV ?= .venv
# A stray train.py in the working folder must not run in place of ours.
export PYTHONSAFEPATH := 1
# Waiting OpenMP threads sleep: spinning ones take a shared machine's cores from each other.
export OMP_WAIT_POLICY ?= PASSIVE
PY := $(VENV)/bin/python

DEMO ?= demo
SLIDES ?=
DATASET ?= dataset
SELECTION ?= train
TILES ?=
ENCODER ?= h0-mini
WEIGHTS ?= hub
CONFIG ?= single-gpu
RUN ?= runs/$(basename $(notdir $(CONFIG)))
NPROC ?= 1
MODEL ?= $(RUN)/model
SYNTHETIC ?= $(RUN)/synthetic
RESULTS ?= $(RUN)/results.json
ARGS ?=

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: SLIDES= DATASET= SELECTION= TILES= ENCODER= WEIGHTS= CONFIG= RUN= NPROC= MODEL= SYNTHETIC= RESULTS= ARGS="

setup: $(VENV)/.installed ## create .venv and install what is needed (skipped when up to date)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## one real slide to a report, on a CPU, in a few minutes; DEMO=folder
	@DEMO='$(DEMO)' PY='$(PY)' bash tests/demo.sh

tile: setup ## SLIDES= to tile shards: scan, tissue, select, tile; DATASET= SELECTION= TILES=
	@[ -n '$(SLIDES)' ] || { echo 'error: say which slides: make tile SLIDES=/path/to/slides DATASET=$(DATASET)' >&2; exit 2; }
	$(PY) -m pipeline scan $(SLIDES) --dataset $(DATASET) $(ARGS)
	$(PY) -m pipeline tissue --dataset $(DATASET)
	$(PY) -m pipeline select --dataset $(DATASET) --name $(SELECTION) $(if $(TILES),--tiles $(TILES))
	$(PY) -m pipeline tile --dataset $(DATASET) --selection $(SELECTION)

cache: setup ## features of DATASET= SELECTION= by ENCODER= with WEIGHTS=
	$(PY) -m pipeline cache --dataset $(DATASET) --selection $(SELECTION) --encoder $(ENCODER) --weights $(WEIGHTS) $(ARGS)

train: setup ## train CONFIG= on DATASET= into RUN=, on NPROC= GPUs or processes; exports to MODEL=
	$(if $(filter-out 1,$(NPROC)),$(VENV)/bin/torchrun --standalone --nproc-per-node $(NPROC) -m train,$(PY) -m train) \
		--config $(CONFIG) data.dataset=$(DATASET) data.selection=$(SELECTION) run.dir=$(RUN) $(ARGS)
	$(PY) -m train export $(RUN) $(MODEL)

sample: setup ## generate with MODEL=, guided by SELECTION= of DATASET=, into SYNTHETIC=
	$(PY) -m evaluate generate --model $(MODEL) --guidance $(DATASET) --selection $(SELECTION) --out $(SYNTHETIC) $(ARGS)

evaluate: setup ## features of SYNTHETIC= and its distance to SELECTION= of DATASET=, into RESULTS=
	$(PY) -m pipeline cache --dataset $(SYNTHETIC) --encoder $(ENCODER) --weights $(WEIGHTS) --tokens none
	$(PY) -m evaluate measure --real $(DATASET) --real-selection $(SELECTION) --generated $(SYNTHETIC) --encoder $(ENCODER) --out $(RESULTS) $(ARGS)

report: setup ## RESULTS= and RUN= as one HTML page, RUN/report.html
	$(PY) -m evaluate report --results $(RESULTS) --run $(RUN) --dataset $(DATASET) --generated $(SYNTHETIC) --out $(RUN)/report.html

test: setup ## the tests that run in under ten minutes on two cores
	$(PY) -m pytest -m 'not full and not gpu'

test-full: setup ## the longer tests as well
	$(PY) -m pytest -m 'full and not gpu'

lint: setup ## ruff (lint and format) and mypy, all clean
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup ## speed as ratios to a floor or a peer in the same run
	@for script in $(filter-out bench/bench_%.py,$(wildcard bench/*.py)); do echo "== $$script"; $(PY) $$script; done

clean: ## remove what the demo, tests and linters made; keeps .venv
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
