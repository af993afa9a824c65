# A thin face over `python -m pipeline | train | evaluate`. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-long tile plan-cohort cache run doctor train sample evaluate report test test-full test-faults test-slurm lint house bench docs clean

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
COHORT ?=
OUT ?= plan
ENCODER ?= h0-mini
WEIGHTS ?= hub
CONFIG ?= single-gpu
RUN ?= runs/$(basename $(notdir $(CONFIG)))
NPROC ?= 1
MODEL ?= $(RUN)/model
SYNTHETIC ?= $(RUN)/synthetic
RESULTS ?= $(RUN)/results.json
# FILE.yaml of docs/cluster.md: stages run as batch jobs, training and generation are sent as one.
CLUSTER ?=
JOBS := $(if $(CLUSTER),--cluster $(CLUSTER))
NODES ?= 1
ARGS ?=

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: SLIDES= DATASET= SELECTION= TILES= COHORT= OUT= ENCODER= WEIGHTS= CONFIG= RUN= NPROC= MODEL= SYNTHETIC= RESULTS= CLUSTER= NODES= ARGS="

setup: $(VENV)/.installed ## create .venv and install what is needed (skipped when up to date)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.12")'
	@# An environment is upgraded in place: what a user has put into it is the user's.
	@if [ -L '$(VENV)' ]; then \
		echo "error: $(VENV) is a link to $$(readlink '$(VENV)'): nothing is installed through a link; install there yourself ($(PY) -m pip install --constraint constraints.txt --editable '.[dev]', then touch $@), or remove the link, or name another folder with VENV=" >&2; exit 2; \
	elif [ ! -e '$(VENV)' ]; then $(PYTHON) -m venv '$(VENV)'; \
	elif [ ! -f '$(VENV)/pyvenv.cfg' ]; then \
		echo 'error: $(VENV) is there and is no virtual environment: remove it, or name another folder with VENV=' >&2; exit 2; \
	elif ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo 'error: $(PY) does not run, or is older than Python 3.11: remove $(VENV), then make setup' >&2; exit 2; \
	elif ! $(PY) -m pip --version > /dev/null 2>&1; then $(PY) -m ensurepip --upgrade > /dev/null; fi
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## one real slide to a report, on a CPU, in a few minutes; DEMO=folder
	@DEMO='$(DEMO)' PY='$(PY)' bash tests/demo.sh

demo-long: setup ## a model of the demo's slide, in an hour and a half on two CPU cores; DEMO=folder ARGS=
	@DEMO='$(if $(filter demo,$(DEMO)),demo-long,$(DEMO))' PY='$(PY)' bash tests/demo_long.sh $(ARGS)

tile: setup ## SLIDES= to tile shards: scan, tissue, select, tile; DATASET= SELECTION= TILES=
	@[ -n '$(SLIDES)' ] || { echo 'error: say which slides: make tile SLIDES=/path/to/slides DATASET=$(DATASET)' >&2; exit 2; }
	@worst=0; stage() { \
		local status=0; $(PY) -m pipeline "$$@" || status=$$?; \
		[ $$status -le 1 ] || exit $$status; [ $$status -eq 0 ] || worst=1; \
	}; \
	stage scan $(SLIDES) --dataset $(DATASET) $(JOBS) $(ARGS); \
	stage tissue --dataset $(DATASET) $(JOBS); \
	stage select --dataset $(DATASET) --name $(SELECTION) $(if $(TILES),--tiles $(TILES)); \
	stage tile --dataset $(DATASET) --selection $(SELECTION) $(JOBS); \
	exit $$worst # 1: slides that could not be used; the others are done

plan-cohort: setup ## plan the selections of a slide list COHORT=FILE.csv into OUT=DIR, before any slide
	@[ -n '$(COHORT)' ] || { echo 'error: say which list of slides: make plan-cohort COHORT=FILE.csv OUT=DIR' >&2; exit 2; }
	$(PY) -m pipeline plan-cohort '$(COHORT)' --out '$(OUT)' $(ARGS)

cache: setup ## features of DATASET= SELECTION= by ENCODER= with WEIGHTS=
	$(PY) -m pipeline cache --dataset $(DATASET) --selection $(SELECTION) --encoder $(ENCODER) --weights $(WEIGHTS) $(JOBS) $(ARGS)

run: setup ## all steps of CONFIG=FILE.yaml (docs/operations.md); CLUSTER=; ARGS=--dry-run plans
	$(PY) -m pipeline run $(CONFIG) $(JOBS) $(ARGS)

doctor: setup ## is this machine fit; with DATASET= its file system too
	$(PY) -m pipeline doctor --dataset $(DATASET) $(ARGS)

ifdef CLUSTER
train: setup ## train CONFIG= on DATASET= into RUN=, on NPROC= GPUs or processes; exports to MODEL=
	$(PY) -m pipeline batch train --cluster $(CLUSTER) > train.sbatch
	CONFIG='$(CONFIG)' DATASET='$(DATASET)' RUN='$(RUN)' MODEL='$(MODEL)' PYTHON='$(PY)' ARGS='data.selection=$(SELECTION) $(ARGS)' \
		sbatch --nodes=$(NODES) train.sbatch

sample: setup ## generate with MODEL=, guided by SELECTION= of DATASET=, into SYNTHETIC=
	$(PY) -m pipeline batch generate --cluster $(CLUSTER) > generate.sbatch
	MODEL='$(MODEL)' GUIDANCE='$(DATASET)' SELECTION='$(SELECTION)' OUT='$(SYNTHETIC)' PYTHON='$(PY)' ARGS='$(ARGS)' \
		sbatch generate.sbatch

evaluate: setup ## features of SYNTHETIC= and its distance to SELECTION= of DATASET=, into RESULTS=
	$(PY) -m pipeline batch evaluate --cluster $(CLUSTER) > evaluate.sbatch
	REAL='$(DATASET)' REAL_SELECTION='$(SELECTION)' GENERATED='$(SYNTHETIC)' RESULTS='$(RESULTS)' ENCODER='$(ENCODER)' \
		WEIGHTS='$(WEIGHTS)' PYTHON='$(PY)' ARGS='$(ARGS)' sbatch evaluate.sbatch
else
train: setup
	$(if $(filter-out 1,$(NPROC)),$(PY) -m common.launch $(NPROC) train,$(PY) -m train) \
		--config $(CONFIG) data.dataset=$(DATASET) data.selection=$(SELECTION) run.dir=$(RUN) $(ARGS)
	$(PY) -m train export $(RUN) $(MODEL)

sample: setup
	$(PY) -m evaluate generate --model $(MODEL) --guidance $(DATASET) --selection $(SELECTION) --out $(SYNTHETIC) $(ARGS)

evaluate: setup
	$(PY) -m pipeline cache --dataset $(SYNTHETIC) --encoder $(ENCODER) --weights $(WEIGHTS) --tokens none
	$(PY) -m evaluate measure --real $(DATASET) --real-selection $(SELECTION) --generated $(SYNTHETIC) --encoder $(ENCODER) --out $(RESULTS) $(ARGS)
endif

report: setup ## RESULTS= and RUN= as one HTML page, RUN/report.html
	$(PY) -m evaluate report --results $(RESULTS) --run $(RUN) --dataset $(DATASET) --generated $(SYNTHETIC) --out $(RUN)/report.html

test: setup ## the tests that run in under ten minutes on two cores
	$(PY) -m pytest -n 2 --dist loadfile -m 'not full and not gpu and not slurm' $(ARGS)

test-full: setup ## the longer tests as well
	$(PY) -m pytest -m 'full and not gpu and not slurm' $(ARGS)

test-faults: setup ## every attack of docs/reliability.md: full disks, power loss, clocks, hostile files
	@set -e; for folder in common evaluate faults pipeline train; do \
		$(PY) -m pytest -rs $$($(PY) tests/faults/attacks.py $$folder) $(ARGS); \
	done

test-slurm: setup ## stages and training as jobs of a real SLURM, started for the tests
	@bash tests/slurm/install.sh
	$(PY) -m pytest -m slurm -rs tests/slurm $(ARGS)

lint: setup ## ruff (lint and format) and mypy, all clean
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

house: ## lines, names, helpers, comments and docstrings, against the design's targets; ARGS=
	@$(PYTHON) bench/house.py $(ARGS)

bench: setup ## speed as ratios to a floor or a peer in the same run
	@missed=; for script in $(filter-out bench/bench_%.py bench/common.py bench/cohort_costs.py bench/house.py,$(wildcard bench/*.py)); do \
		echo "== $$script"; $(PY) $$script || missed="$$missed $$script"; done; \
	[ -z "$$missed" ] || { echo "goals missed or not measured:$$missed" >&2; exit 1; }

docs: setup ## the documentation as a site, in site/
	$(VENV)/bin/mkdocs build --strict

clean: ## remove what the demo, tests and linters made; keeps .venv
	rm -rf $(DEMO) demo-long .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out site
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
