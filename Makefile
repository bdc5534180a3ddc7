# Each target sets up what it needs in .venv; a second call starts at once.
# `make` alone lists the targets.

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready
OLDEST := .venv-oldest
KATEX  := docs/hooks/node_modules/.package-lock.json

# The tutorials run on the official data when HBP_DATA names a folder that has it,
# otherwise on the small stand-ins that need no download.
OFFICIAL := $(and $(HBP_DATA),$(wildcard $(HBP_DATA)/cifar-10-batches-py),$(wildcard $(HBP_DATA)/MNIST))
NBVAL    := $(BIN)/pytest -p no:cacheprovider --nbval --nbval-current-env
QUICK    := HBP_TUTORIAL=quick $(NBVAL) --nbval-cell-timeout=600
FULL     := env -u HBP_TUTORIAL $(NBVAL) --nbval-cell-timeout=7200

# One target for each notebook, so that `make -j` can compare several at once. The
# longest come first: what is started last shall be short.
LONGEST  := compare-02_sequential_cifar10 compare-06_when_curvature_pays
ALL      := $(patsubst tutorials/%.ipynb,compare-%,$(wildcard tutorials/[0-9]*.ipynb))
COMPARED := $(LONGEST) $(filter-out $(LONGEST),$(ALL))

# What runs with the oldest versions, and the Python for it, unless one is given.
OLDEST_PYTHON ?= $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
CORE := behaviour blocks cg cg_newton cg_rows checkpoint columns convert \
        datasets errors exact layers losses modules operators parallel precision reference

.DEFAULT_GOAL := help
.PHONY: help setup tutorials test oldest unit $(COMPARED) tutorials-official \
        execute time sync docs serve lint \
        size calls bench bench-accuracy bench-paper bench-convolution bench-tested wheel check-dist colab \
        browser constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python has no venv module: on Debian, apt-get install python3-venv."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt \
	  --editable ".[tutorials,docs,dev]"
	touch $@

$(KATEX): docs/hooks/package-lock.json
	@command -v npm >/dev/null || { echo "The formulas of the site need KaTeX, which \
	npm installs: please install Node.js (on Debian, apt-get install npm)."; exit 1; }
	cd docs/hooks && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

setup: $(READY)  ## create .venv with everything in it

tutorials: $(READY)  ## run the tutorials on small data, about a minute each
	HBP_TUTORIAL=quick $(BIN)/python tools/notebooks.py run --into build/tutorials
	@echo "Open these in a browser or a notebook editor:" && ls build/tutorials/*

test: unit $(COMPARED)  ## unit tests, then every cell of the tutorials

unit: $(READY)
	$(BIN)/pytest

$(COMPARED): compare-%: $(READY)
	$(if $(OFFICIAL),$(FULL),$(QUICK)) tutorials/$*.ipynb

tutorials-official: $(READY)  ## compare the tutorials with a run on the official data
	$(FULL) tutorials

execute: $(READY)  ## run on the official data and overwrite the committed notebooks
	env -u HBP_TUTORIAL CUDA_VISIBLE_DEVICES= $(BIN)/python tools/notebooks.py run

time: $(READY)  ## run on this machine's GPU, and note in the notebooks how long it took
	env -u HBP_TUTORIAL $(BIN)/python tools/notebooks.py time

# The oldest Python, and of every package the oldest version, that pyproject.toml allows.
$(OLDEST)/ready: $(READY)
	$(BIN)/uv venv --clear --python $(OLDEST_PYTHON) $(OLDEST)
	$(BIN)/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
	  --editable ".[tutorials,dev]"
	touch $@

oldest: $(OLDEST)/ready  ## the tests of the package, with the oldest versions that it allows
	$(OLDEST)/bin/python -m pytest $(CORE:%=tests/test_%.py)

sync: $(READY)  ## write the notebooks from their scripts, keep unchanged outputs
	$(BIN)/python docs/hooks/repository.py
	$(BIN)/python tools/notebooks.py sync

docs: $(READY) $(KATEX)  ## build the site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(READY) $(KATEX)  ## show the site and rebuild it as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bench-ready: $(READY)
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt \
	  --editable ".[bench]"
	touch $@

size:  ## lines of code of the package, file by file
	@$(PYTHON) tools/size.py

calls: $(READY)  ## how many functions one step runs through
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.calls

bench: .venv/bench-ready  ## time a training step next to those of others
	PYTHONPATH=tests $(BIN)/python -m benchmarks
	$(BIN)/python tools/draw_benchmarks.py

bench-accuracy: $(READY)  ## time to accuracy on CIFAR-10, an hour or so
	PYTHONPATH=tests $(BIN)/python -m benchmarks.accuracy
	$(BIN)/python tools/draw_accuracy.py

bench-paper: $(READY)  ## train with the settings of the paper, half an hour
	PYTHONPATH=tests $(BIN)/python -m benchmarks.paper
	$(BIN)/python tools/draw_accuracy.py

bench-convolution: $(READY)  ## the recorded run of tutorial 05, a quarter of an hour
	PYTHONPATH=tests $(BIN)/python -m benchmarks.convolution_training

bench-tested: $(READY)  ## the tables of "What is tested, and how", a quarter of an hour
	mkdir -p build docs/assets/measured
	for name in ordinary precision joint endurance suite; do \
	  PYTHONPATH=tests $(BIN)/python -m benchmarks.$$name > build/$$name.md && \
	  mv build/$$name.md docs/assets/measured || exit 1; done

# The pinned hatchling: the same commit gives the same bytes, today and next year.
wheel: $(READY)  ## build the source distribution and the wheel into dist
	rm -rf dist
	UV_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --installer uv

check-dist: wheel  ## check both, and use the wheel where nothing but torch is
	$(BIN)/python tools/check_dist.py "$$TAG"

colab: wheel  ## rehearse Colab: each notebook alone, in a bare environment
	$(BIN)/python tests/colab_rehearsal.py

browser: docs  ## look at every page with chromium
	$(BIN)/pytest tests/browser

constraints: $(READY)  ## pin the newest versions of everything
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
	  --upgrade --no-annotate --no-header --strip-extras --quiet -o constraints.txt

clean:  ## remove what the targets made, except .venv
	rm -rf build dist docs/hooks/node_modules .hypothesis .*_cache
