# `make demo` and `make test` need nothing set up before: Python 3.11, gcc and make are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: setup demo test lint bench wheel fuzz clean help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv with pinned packages and this project, editable; rebuilds when csrc/ changes

.venv/.packages: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r constraints.txt
	@touch $@

$(STAMP): .venv/.packages $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: setup ## train a small model on generated clips and search them; VIDEOS=dir scores your own
	$(BIN)/drl-fast demo $(if $(VIDEOS),--videos $(VIDEOS)) $(if $(PRETRAINED),--pretrained $(PRETRAINED))

test: setup ## all tests
	$(BIN)/python -m pytest

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## the benchmark table, JSON and plots
	$(BIN)/python benchmarks/bench_wti.py

fuzz: setup ## the long random run
	DRL_FAST_FUZZ=1 $(BIN)/python -m pytest tests/ops/test_fuzz.py -s

wheel: setup ## one cp310-abi3 wheel and an sdist under dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove everything that was built
	rm -rf .venv build dist *.egg-info drl_fast/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
