# Every target sets up .venv by itself. The ones to know: make report, make test.

PYTHON ?= python3
EXPERIMENT ?= quick
CORES ?= all

BIN := .venv/bin
READY := .venv/.ready
# A worker a core, each with one thread; four at most, for some tests take gigabytes.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup report test smoke slow browser lint format schema lock publish benchmark benchmark-memory \
        benchmark-scale agreement gpu-check claims clean

help:
	@echo "make report [EXPERIMENT=quick]   train, measure and write reports/EXPERIMENT/report.html"
	@echo "make test                        the tests and the smoke pipeline"
	@echo "make setup                       .venv with the locked dependencies and peftscope itself"
	@echo "make publish EXPERIMENT=quick    copy a finished run's small files to where they are committed (or memory, gpu)"
	@echo "make claims                      measure what the literature claims; reports/EXPERIMENT/claims.html"
	@echo "make benchmark                   our training step against the HF Trainer"
	@echo "make benchmark-memory            the memory calculator's speed, beside accelerate's estimate"
	@echo "make benchmark-scale             how the suite grows from 50 to 5,000 runs; docs/scale.md"
	@echo "make agreement                   closed form against simulation, on random runs"
	@echo "make gpu-check                   predicted against measured memory, on a CUDA card"
	@echo "make lint | slow | browser       checks; long tests; the report in a real browser"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

report: $(READY)
	@$(BIN)/peftscope expand $(EXPERIMENT) --brief
	@$(BIN)/peftscope unlock
	@$(BIN)/snakemake --cores $(CORES) --config experiment=$(EXPERIMENT)
	@echo "The report: $(CURDIR)/reports/$(EXPERIMENT)/report.html"

smoke: $(READY)
	@$(MAKE) --no-print-directory report EXPERIMENT=smoke

test: $(READY)
	$(PYTEST) -m "not slow and not browser"
	@$(MAKE) --no-print-directory smoke

slow: $(READY)
	$(PYTEST) -m "slow and not alone"
	$(BIN)/pytest -m alone

browser: smoke
	$(BIN)/pytest -m browser

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt Snakefile

schema: $(READY)
	$(BIN)/peftscope schema > experiments/spec.schema.json

publish: $(READY)
	$(BIN)/peftscope publish $(EXPERIMENT)

benchmark: $(READY)
	$(BIN)/python -m peftscope.training.benchmark

benchmark-memory: $(READY)
	$(BIN)/python -m peftscope.memory.benchmark

benchmark-scale: $(READY)
	$(BIN)/python -m peftscope.report.benchmark

agreement: $(READY)
	$(BIN)/python -W ignore -m peftscope.memory.agreement

claims: $(READY)
	$(BIN)/peftscope fetch smollm2-135m
	$(BIN)/peftscope fetch minilm
	$(BIN)/peftscope claims --experiment $(EXPERIMENT)

gpu-check: $(READY)
	$(BIN)/python -W ignore -m peftscope.memory.gpu_check

# torch stays a range: pip then takes the build that fits the machine.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade pip
	.venv-lock/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-lock/bin/python -m pip freeze --exclude-editable --exclude pip \
	  | sed -e 's/^torch==.*/torch>=2.9,<3/' -e '/^cuda-/d' -e '/^nvidia-c/d' -e '/^nvidia-nccl/d' -e '/^nvidia-nv/d' -e '/^triton==/d' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .snakemake results/smoke reports/smoke
