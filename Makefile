# Every target makes its own environment: .venv, only when it is missing or older than what it was made from.
# `make test PY=python` uses the environment at hand instead (a GPU machine's, say) and sets nothing up.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.made-for
EXTRAS := dev
ARGS ?=
WORKERS ?= 2

# The first interpreter that is new enough; the pins were made with 3.11.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)

ifeq ($(PY),$(VENV)/bin/python)
SETUP := $(STAMP)
# An environment knows its own path: one that was moved or copied is stale.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
endif

LAB = $(PY) -m hcms_lab
NBCONVERT := -m nbconvert --log-level=WARN --to notebook --execute --output-dir outputs/notebooks

.PHONY: help setup fig3 test lint types notebooks-check check format notebooks reproduce figures readme readme-check sync page \
	contribute compare claims dashboard notebook-files tiny-model gpu-one gpu-four soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(SETUP) ## make .venv with the pinned versions, or bring it up to date

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found: name one with PYTHON=..." >&2; exit 2; }
	@echo "Setting up $(VENV) with the pinned versions (minutes, once)"
	@if ! $(PY) -c '' 2>/dev/null || { test -f $(STAMP) && test "$$(cat $(STAMP))" != "$(CURDIR)"; }; then \
		"$(PYTHON)" -m venv --clear $(VENV); fi
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@echo "$(CURDIR)" > $@

fig3: $(SETUP) ## Figure 3, latency by sequence length: measure, print the table, draw figures/fig3.pdf (ARGS="key=value ...")
	$(PY) experiments/run.py +exp=fig3 $(ARGS)
	$(PY) $(NBCONVERT) notebooks/fig3.ipynb

test: $(SETUP) ## the tests, in 2 workers (WORKERS=0 is none; ARGS="-k plan" and the like go to pytest)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(SETUP) ## ruff: rules and format; import-linter: arrows one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"

format: $(SETUP) ## ruff: mend what it can and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(SETUP) ## pyright
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

notebooks-check: $(SETUP) ## run every notebook and keep nothing of it but its figures
	$(PY) -m pytest --nbmake --nbmake-timeout=300 --timeout=300 notebooks

check: lint types test notebooks-check readme-check ## lint, types, tests, notebooks, README

notebooks: $(SETUP) ## redraw every figure from the newest records
	$(PY) $(NBCONVERT) notebooks/*.ipynb

reproduce: $(SETUP) ## every figure and table, one after the other
	$(LAB) reproduce $(ARGS)

figures: $(SETUP) ## draw every figure of the committed records
	$(LAB) figures $(ARGS)

readme: $(SETUP) ## write the results into README.md
	$(LAB) readme

readme-check: $(SETUP) ## fail where README.md is not what `make readme` would write
	$(LAB) readme --check

sync: $(SETUP) ## send offline W&B runs to the server
	$(LAB) sync $(ARGS)

page: $(SETUP) ## build the static results page
	$(LAB) page $(ARGS)

tiny-model: $(SETUP) ## write a small random pipeline to try the drop-in on (ARGS=folder)
	$(LAB) tiny-model $(ARGS)

contribute: $(SETUP) ## place a run among the committed records (ARGS=outputs/fig3/latest)
	$(LAB) contribute $(ARGS)

compare: $(SETUP) ## runs of one experiment side by side (ARGS=fig3)
	$(LAB) compare $(ARGS)

claims: $(SETUP) ## the claims against the committed records, or against this machine's runs (ARGS=--own)
	$(LAB) claims $(ARGS)

dashboard: $(SETUP) ## build the W&B workspace and report (ARGS="entity=NAME project=NAME")
	$(LAB) dashboard $(ARGS)

notebook-files: $(SETUP) ## write the notebooks from their template
	$(LAB) notebooks $(ARGS)

gpu-one: $(SETUP) ## what one GPU can measure, in calls of 9 minutes until all is done; without one, the CPU's
	$(LAB) gpu-one $(ARGS)

gpu-four: $(SETUP) ## what two to eight GPUs can measure
	$(LAB) gpu-four $(ARGS)

soak: $(SETUP) ## 30 minutes of the same cases: nothing grows, no result changes (ARGS="minutes=2")
	$(PY) experiments/run.py +exp=soak $(ARGS)

clean: ## remove .venv and caches; runs under outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
