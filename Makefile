# deltarl's commands. PYTHON picks the interpreter that .venv is made with (3.11 to 3.13).
export PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help run test lint setup setup-test clean

help:
	@echo "make run     set up .venv and train the quick-start job"
	@echo "make test    set up .venv, then the linter and every test"
	@echo "make lint    the linter alone"
	@echo "make setup   .venv with the CPU profile, nothing more"
	@echo "make clean   remove .venv and caches (runs/ stays)"

run: setup
	.venv/bin/deltarl train jobs/quickstart.yaml

test: lint
	.venv/bin/pytest

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

setup:
	@requirements/install.sh cpu

setup-test:
	@requirements/install.sh cpu test

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis deltarl.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
