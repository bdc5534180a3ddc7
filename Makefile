# Each target sets up what it needs in .venv; a second call starts at once.
# `make` alone lists the targets.

# Where this is set, every process compiles torch anew: 4 s more for each import.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN    := .venv/bin
OLDEST := .venv-oldest
KATEX  := docs/hooks/node_modules/.package-lock.json

# uv installs ten times as fast as pip. If it isn't here, pip brings it.
FOUND := $(shell which uv 2>/dev/null)
UV    := $(or $(FOUND),$(BIN)/uv)

# What a target needs is installed when it is first called, by the names of
# pyproject.toml: the tutorials don't need what builds the site.
TUTORIALS := .venv/has-tutorials
TESTS     := $(TUTORIALS) .venv/has-dev
SITE      := $(TESTS) .venv/has-docs

# Two processes with a thread each: two that both want both cores slow each other down.
JOBS  ?= 2
ONE   := OMP_NUM_THREADS=1
QUICK := $(ONE) HBP_TUTORIAL=quick
FULL  := env -u HBP_TUTORIAL CUDA_VISIBLE_DEVICES=
RUN   := $(BIN)/python tools/notebooks.py
# A notebook, and a file of tests, stays in one process. The notebooks, which take
# longest, come first.
TEST  := $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout

# What runs with the oldest versions, and the Python for it, unless one is given.
OLDEST_PYTHON ?= $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup tutorials test test-all coverage official oldest execute time sync docs \
        serve lint size calls gpu bench bench-accuracy bench-paper bench-convolution \
        bench-tested wheel check-dist colab browser constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

$(BIN)/python:
ifdef FOUND
	$(UV) venv --quiet $(if $(filter file,$(origin PYTHON)),,--python $(PYTHON)) .venv
else
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python has no venv module: on Debian, apt-get install python3-venv."; exit 1; }
	$(PYTHON) -m venv .venv
endif

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv

.venv/has-%: pyproject.toml constraints.txt | $(BIN)/python $(if $(FOUND),,$(BIN)/uv)
	$(UV) pip install --python $(BIN)/python --quiet --constraint constraints.txt \
	  --editable ".[$*]"
	@touch $@

$(KATEX): docs/hooks/package-lock.json
	@command -v npm >/dev/null || { echo "The formulas of the site need KaTeX, which \
	npm installs: please install Node.js (on Debian, apt-get install npm)."; exit 1; }
	cd docs/hooks && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

setup: $(SITE)  ## create .venv with what tutorials, tests and site need

tutorials: $(TUTORIALS)  ## run the tutorials on small data, two at a time
	$(QUICK) $(RUN) run --jobs $(JOBS) --into build/tutorials

test: $(SITE)  ## every cell of the tutorials, on small data, and the tests
	$(QUICK) $(TEST) $(NBVAL)=600 tutorials tests

test-all: $(SITE) official oldest  ## with all that takes long, half an hour or more
	$(ONE) HBP_TEST_ALL=1 HBP_FUZZ=1500 $(TEST) -m "" tests

coverage: $(SITE)  ## which lines and branches of the package no test runs
	$(ONE) $(TEST) -m "" --cov=hbp --cov-report=term-missing:skip-covered tests
	{ printf '| package | lines and branches that a test runs |\n|---|--:|\n'; \
	  printf '| `hbp.core` | %s %% |\n' \
	    $$($(BIN)/coverage report --format=total --include='*/hbp/core/*'); \
	  printf '| `hbp` | %s %% |\n' $$($(BIN)/coverage report --format=total); \
	} > docs/assets/measured/coverage.md

official: $(TESTS)  ## compare with the official data what was run with other code
	names=$$($(RUN) stale) || exit 1; [ -z "$$names" ] || { \
	  $(ONE) $(FULL) $(TEST) $(NBVAL)=7200 $$names && $(RUN) vouch $$names; }

execute: $(TUTORIALS)  ## run on the official data and overwrite the committed notebooks
	$(FULL) $(RUN) run --jobs $(JOBS)

time: $(TUTORIALS)  ## run on this machine's GPU, and note in the notebooks how long it took
	env -u HBP_TUTORIAL $(RUN) time

# The oldest Python, and of every package the oldest version, that pyproject.toml allows.
$(OLDEST)/ready: $(TESTS)
	$(UV) venv --clear --python $(OLDEST_PYTHON) $(OLDEST)
	$(UV) pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
	  --editable ".[tutorials,dev]"
	touch $@

oldest: $(OLDEST)/ready  ## the tests of the package, with the oldest versions that it allows
	$(ONE) $(OLDEST)/bin/python -m pytest tests/core tests/layers tests/addons \
	  tests/site/test_checkpoint.py tests/tutorials/test_datasets.py

sync: $(TESTS)  ## write the notebooks from their scripts, keep unchanged outputs
	$(BIN)/python docs/hooks/repository.py
	$(RUN) sync

docs: $(SITE) $(KATEX) wheel  ## build the site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(SITE) $(KATEX) wheel  ## show the site and rebuild it as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(TESTS)  ## ruff, mypy, and zizmor for the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github/workflows

size:  ## lines of code of the package, file by file
	@$(PYTHON) tools/size.py

calls: $(TUTORIALS)  ## how many functions one step runs through
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.calls

gpu: $(TESTS) .venv/has-bench  ## on a GPU: its tests, steps timed, tutorials timed
	$(BIN)/pytest tests/core/test_device.py tests/core/test_cost.py
	$(BIN)/pytest tests/addons/test_parallel.py -k shared_with_nobody
	PYTHONPATH=tests $(BIN)/python -m benchmarks --device cuda
	$(BIN)/python tools/draw_benchmarks.py
	env -u HBP_TUTORIAL $(RUN) time

bench: $(TESTS) .venv/has-bench  ## time a training step next to those of others
	PYTHONPATH=tests $(BIN)/python -m benchmarks
	$(BIN)/python tools/draw_benchmarks.py

bench-accuracy: $(TESTS)  ## the race on CIFAR-10, some hours
	PYTHONPATH=tests $(BIN)/python -m benchmarks.accuracy
	$(BIN)/python tools/draw_accuracy.py

bench-paper: $(TESTS)  ## train with the settings of the paper, half an hour
	PYTHONPATH=tests $(BIN)/python -m benchmarks.paper
	$(BIN)/python tools/draw_accuracy.py

bench-convolution: $(TESTS)  ## the recorded run of tutorial 05, a quarter of an hour
	PYTHONPATH=tests $(BIN)/python -m benchmarks.convolution_training

bench-tested: $(TESTS)  ## the tables of "What is tested, and how", half an hour
	mkdir -p build docs/assets/measured
	for name in ordinary fitting precision joint endurance suite; do \
	  PYTHONPATH=tests $(BIN)/python -m benchmarks.$$name > build/$$name.md && \
	  mv build/$$name.md docs/assets/measured || exit 1; done

# The pinned hatchling: the same commit gives the same bytes, today and next year.
wheel: $(TESTS)  ## build the source distribution and the wheel into dist
	rm -rf dist
	UV_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --installer uv

check-dist: wheel  ## check both, and use the wheel where nothing but torch is
	$(BIN)/python tools/check_dist.py "$$TAG"

colab: wheel  ## rehearse Colab: each notebook alone, in a bare environment
	$(BIN)/python tests/colab_rehearsal.py $(NOTEBOOKS)

browser: docs  ## look at every page with chromium
	$(ONE) $(TEST) --dist load tests/site/browser

constraints: $(TESTS)  ## pin the newest versions of everything
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --upgrade --no-annotate --no-header --strip-extras --quiet -o constraints.txt

clean:  ## remove what the targets made, except .venv
	rm -rf build dist docs/hooks/node_modules .hypothesis .*_cache
