# Each target installs what it needs into .venv.
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
.PHONY: help up local compare chart logs docs test lint audit behaviours proof faults soak bench mutants clean

# A target's help follows its ##; its variables follow on lines of their own.
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2} /^## / {printf "%15s %s\n", "", substr($$0, 4)}' Makefile

up: ## run the harness in containers, until the client ends
## WORKERS=6, and the variables of .env.example
	$(COMPOSE) up --build --scale worker=$(or $(WORKERS),6) --abort-on-container-exit --exit-code-from client

local: $(VENV)/.local ## run it without Docker, on REDIS_URL or on its own server
## WORKERS=6, and the variables of .env.example
	@$(VENV)/bin/python -m harness local --with-parent

compare: $(VENV)/.compare ## compare both orderings: the loss, and the cure's cost
## ARGS="--node --json --rounds 5 --seconds 8"
	@$(VENV)/bin/python -m harness compare $(ARGS)

chart: logs $(VENV)/.chart ## draw saved logs
## LOGS="a.log NAME=b.log" CHART=chart.png (or .svg) INTERVAL=3
	@$(VENV)/bin/python -m harness chart $(LOGS) --output $(CHART) --interval $(INTERVAL)

logs:
	@$(if $(LOGS),,echo 'Name the logs: make chart LOGS="a.log NAME=b.log"' >&2; exit 2)

docs: $(VENV)/.docs ## build the pages and the API reference in site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "site/index.html; with its search: $(VENV)/bin/python -m http.server --directory site"

test: $(VENV)/.test ## run all tests in parallel; with containers if Docker runs
## TESTS=tests/wire PROCESSES=4 TEST_LOOP=uvloop
	$(VENV)/bin/python -m pytest -n $(PROCESSES) $(TESTS)

lint: $(VENV)/.test ## run ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

audit: $(VENV)/.audit ## list known vulnerabilities of the installed packages
	@$(VENV)/bin/python -m tests.audit

proof: $(VENV)/.test ## check in a million saves that no reply follows the event
## ROUNDS=1000000
	ROUNDS=$${ROUNDS:-1000000} $(VENV)/bin/python -m pytest tests/producer/test_proof.py

faults: $(VENV)/.test ## break workers, Redis, connections; check every job
## SEED=189 ROUNDS=10 TIMES=3 FAULTS="kill-workers"
	SEED=$${SEED:-189} ROUNDS=$${ROUNDS:-10} TIMES=$${TIMES:-3} FAULTS="$(FAULTS)" $(VENV)/bin/python -m pytest -s tests/faults

soak: $(VENV)/.test ## run for 30 minutes with a fault every 20 s
## SEED=1 MINUTES=30 EVERY=20 FAULTS="kill-workers"
	@FAULTS="$(FAULTS)" $(VENV)/bin/python -m tests.faults.soak

mutants: $(VENV)/.mutants ## put faults into the code; list those no test notices
## MODULES="events settings"
	$(VENV)/bin/python -m tests.mutants

behaviours: $(VENV)/.test ## list bee-queue's behaviours that no test names
	$(VENV)/bin/python -m tests.behaviours

bench: $(VENV)/.bench ## measure beequeue, bee-queue and other queues: 7 minutes
## BENCH="--only drain --rounds 9" BENCH_PYTHON=/usr/bin/python3
	@$(VENV)/bin/python -m bench $(BENCH)

clean: ## remove .venv and the tools' files
	rm -rf $(VENV) bench/.venv-* bench/peers/.venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .mutants *.egg-info build site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.13 …" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) >&2

# The extras of pyproject.toml that a target needs; bench needs none.
extras-local := [server]
extras-compare := [compare]
extras-chart := [chart]
extras-docs := [docs]
extras-audit := [audit]
extras-test := [server,test,lint]
extras-mutants := [server,test,lint,mutants]

$(VENV)/.%: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), for make $*" >&2
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.$(extras-$*)' >&2
	@touch $@
