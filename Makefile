# Everything runs through dev/enter: on this host if it has PostgreSQL 18 with DocumentDB, else in a cached Debian root.

RUN_DIR ?= .run
PORT ?= 27017
PG_PORT ?= 5433
ARGS ?=
MINUTES ?= 30
MESSAGES ?= 100000

override RUN_DIR := $(abspath $(RUN_DIR))
export RUN_DIR
PYTHON_CODE := pg_ferret supervisor config dev tests bench
INSTANCE := dev/enter python3 -m dev.instance
MEASURE := dev/enter --private --finish
TESTS := dev/enter --private --finish --as postgres python3 -m pytest

.DEFAULT_GOAL := help
.PHONY: help run start stop uri psql build test unit integration bench faults soak fuzz lint fmt generate clean

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo
	@echo "  RUN_DIR=$(RUN_DIR) PORT=$(PORT) PG_PORT=$(PG_PORT)"
	@echo "  Other values of all three give another instance beside this one."

run: build ## start PostgreSQL with pg_ferret in the foreground; Ctrl-C stops it
	@dev/enter --finish python3 -m dev.instance run --port $(PORT) --pg-port $(PG_PORT)

start: build ## start it in the background; the last line is the URI
	@$(INSTANCE) start --port $(PORT) --pg-port $(PG_PORT)

stop: ## stop it
	@$(INSTANCE) stop

uri: ## print the URI of the running instance
	@cat '$(RUN_DIR)/uri' 2>/dev/null || { echo "pg_ferret: not running, try make start" >&2; exit 1; }

psql: ## SQL beside it: make psql ARGS="-xc 'select * from ferretdb.status'"
	@$(INSTANCE) psql -- $(ARGS)

build: ## compile the extension (outside the checkout)
	@dev/enter --write --as owner python3 -m compileall -q pg_ferret supervisor config
	@dev/enter dev/build

test: lint build ## lint, unit and integration tests
	@$(TESTS) tests $(ARGS)

unit: build ## unit tests; ARGS= goes to pytest
	@$(TESTS) tests/unit $(ARGS)

integration: build ## tests against a real server; ARGS= goes to pytest
	@$(TESTS) tests/integration $(ARGS)

bench: override RUN_DIR := $(RUN_DIR)/bench
bench: build ## measure beside FerretDB and write docs/performance.*; QUICK=1, ONLY="scan insert" ROUNDS=9: prints only
	@bench/build '$(RUN_DIR)/bin'
	@bench/group dev/enter --private python3 -m bench --bin /instance/bin --out /instance/result.json $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS))
	@dev/enter --write --as owner python3 -m bench.report /instance/result.json $(if $(QUICK)$(ONLY)$(ROUNDS),,docs)

faults: override RUN_DIR := $(RUN_DIR)/faults
faults: build ## break everything under load and write docs/reliability.md; ARGS="--only killed" prints only
	@$(MEASURE) python3 -m tests.faults $(if $(ARGS),$(ARGS),--json /instance/faults.json --page /instance/reliability.md)
	$(if $(ARGS),,@dev/enter --write --as owner cp /instance/reliability.md /instance/faults.json docs/)

soak: override RUN_DIR := $(RUN_DIR)/soak
soak: build ## load and random faults for MINUTES=30, and whether anything grows
	@$(MEASURE) python3 -m tests.faults.soak --minutes $(MINUTES) --json /instance/soak.json

fuzz: build ## MESSAGES=100000 damaged messages at a live server
	@$(MEASURE) python3 -m tests.fuzz.live --messages $(MESSAGES)

lint: ## ruff, mypy, and that generated files are up to date
	@dev/enter ruff check --quiet .
	@dev/enter ruff format --quiet --check .
	@dev/enter mypy $(PYTHON_CODE)
	@dev/enter python3 -m config --check

fmt: ## format the Python code
	@dev/enter --write --as owner ruff check --quiet --fix-only .
	@dev/enter --write --as owner ruff format .

generate: ## write the files that follow from config/settings.py
	@dev/enter --write --as owner python3 -m config

clean: stop ## stop, and remove the data; the cached root stays
	@dev/enter find /instance -mindepth 1 -delete
	@rmdir '$(RUN_DIR)'
