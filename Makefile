# minimax-fleet: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-thorough test-vllm check quick lab-up lab-down bench golden lock

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete ## Install what this machine needs: a Python environment from requirements.lock

$(VENV)/.complete: requirements.lock pyproject.toml
	@echo "setup: Python environment in $(VENV), by requirements.lock"
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: installing python3-venv"; \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends python3-venv >/dev/null; }
	@test -x $(BIN)/python3 || python3 -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## Build a lab site on this machine, roll MiniMax out to it, and ask it a question
	@$(BIN)/python -m lab.demo

test: check ## Style, types, unit, template and lab tests, but for the thorough ones (builds the lab on first use)
	@echo "test: unit and template tests, a dot each; then the lab's, which say what they are doing"
	@$(BIN)/pytest -m "not thorough" tests/unit tests/templates tests/lab

test-thorough: setup ## The lab tests that `make test` leaves out: what takes long or repeats a fault at further points (20 minutes)
	@$(BIN)/pytest -m thorough tests/lab

check: setup ## Style and types
	@echo "check: style"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "check: types, for half a minute"
	@$(BIN)/mypy

test-vllm: setup ## Every recipe through the real vLLM's own parser (five wheels from the package index; 4 minutes)
	@$(BIN)/pytest tests/vllm

quick: setup ## The inner loop: unit and template tests, no lab
	@$(BIN)/pytest tests/unit tests/templates -q

lab-up: setup ## Start the lab's hosts (LAB_HOSTS=20 for more)
	@$(BIN)/lab up

lab-down: setup ## Take the lab down; nothing of it is left but its caches
	@$(BIN)/lab down

bench: setup ## Measure roll-outs beside the floor and beside Ansible (45 minutes; takes the lab down)
	@$(BIN)/python -m bench

golden: setup ## Write the golden files anew, to be reviewed as a diff
	@GOLDEN=write $(BIN)/pytest -q tests/templates

lock: ## Resolve requirements.lock anew
	@test -x $(BIN)/uv || { python3 -m venv $(VENV) && $(BIN)/pip install --quiet uv; }
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header --all-extras \
	  -o requirements.lock pyproject.toml
