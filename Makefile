# Every target sets up .venv by itself. The ones to know: make report, make test.

PYTHON ?= python3
# Notebooks lack venv, and bring a torch: python3 -m virtualenv --system-site-packages.
MAKE_VENV ?= $(PYTHON) -m venv
EXPERIMENT ?= quick
CORES ?= all
# How to run: on this machine, with so many cards, and cores for each job; or PROFILE=slurm, whose plugin slows every start
# and has an environment of its own.
PROFILE ?= default
GPUS ?= 1

ifeq ($(PROFILE),default)
VENV := .venv
# Runs that share the machine stay within 80 % of the memory that is free.
FREE := import psutil; print(int(0.8e-6 * psutil.virtual_memory().available))
PLACE = --cores $(CORES) --resources gpu=$(GPUS) mem_mb=$$($(BIN)/python -c '$(FREE)') $(if $(THREADS),--set-threads train=$(THREADS))
else
VENV := .venv-$(PROFILE)
PLACE := --workflow-profile profiles/$(PROFILE)
EXTRA := [all,$(PROFILE)]
endif
# Packages without a wheel: only these may run a build of their own.
SOURCE_ONLY := cellpylib,connection-pool,pycosat,rouge-score,sqlitedict,word2number,zss
# Up to the version that memory/kernels.py was read in. TORCH_INDEX=ADDRESS takes another build of it, as pip's --index-url
# does: drivers before 580 and cards before Turing need one for CUDA 12.6, which pytorch.org's install page names.
TORCH := torch>=2.9,<2.14
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A worker a core, each with one thread; four at most, for some tests take gigabytes.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup report test test-faults test-slurm test-oldest test-newest smoke slow \
        browser lint format schema docs lock audit sbom publish benchmark-scale agreement scorecard speed \
        peft-comparison verify gpu-first gpu-check claims site tuners clean

help:
	@echo "make report [EXPERIMENT=quick]   train, measure and write reports/EXPERIMENT/report.html; \"a b\" for two"
	@echo "make report RESUME=1             the same, from the published runs on"
	@echo "make test                        the tests and the smoke pipeline"
	@echo "make setup                       .venv with the locked dependencies and peftscope itself"
	@echo "make publish EXPERIMENT=quick    copy a finished run's small files to where they are committed (or claims, memory)"
	@echo "make verify [EXPERIMENT=quick]   run published runs again: which numbers come out the same"
	@echo "make claims                      measure what the literature claims; reports/claims.html"
	@echo "make site                        findings, claims, reports, calculator, how-to pages: site/index.html (needs npm)"
	@echo "make benchmark-scale             what reports of 50 to 5,000 runs take; docs/scale.md"
	@echo "make agreement                   closed form against simulation, on random runs"
	@echo "make scorecard                   published peaks against the closed form, the simulation, and estimators of others"
	@echo "make speed                       published speeds against the time model, whose constants are fitted to them"
	@echo "make peft-comparison             how many orderings of PEFT's published runs could be chance"
	@echo "make test-faults                 kills, full disks, damaged files: what is lost (nothing)"
	@echo "make test-slurm                  the smoke pipeline on a real Slurm, started on this machine"
	@echo "make test-oldest | test-newest   the tests with the oldest and newest torch, transformers, peft"
	@echo "make audit | sbom                known vulnerabilities of what is installed; a list of it"
	@echo "make docs                        write the generated parts of docs/architecture.md and README.md"
	@echo "make tuners                      what each tuner of PEFT can do here, on the toy model; docs/tuners.md"
	@echo "make gpu-first [DEVICE=cpu]      ten minutes on a CUDA card: each method's peak and speed beside what is predicted"
	@echo "make gpu-check [DEVICE=cpu]      memory, fit, speed and latency on a CUDA card, for the claims that they decide"
	@echo "make lint | slow | browser       checks; long tests; the report in a real browser"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(MAKE_VENV) $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	$(BIN)/python -m pip install --quiet --progress-bar on --require-hashes --no-deps \
	  --only-binary :all: --no-binary $(SOURCE_ONLY) -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(if $(EXTRA),$(BIN)/python -m pip install --quiet --editable '.$(EXTRA)')
	@touch $@

report: $(READY)
	@for name in $(EXPERIMENT); do \
	  $(if $(RESUME),$(BIN)/peftscope restore $$name &&) $(BIN)/peftscope expand $$name --brief || exit; done
	@$(BIN)/peftscope unlock
	@$(BIN)/snakemake $(PLACE) --config experiment="$(EXPERIMENT)"
	@for name in $(EXPERIMENT); do echo "The report: $(CURDIR)/reports/$$name/report.html"; done

smoke: $(READY)
	@$(MAKE) --no-print-directory report EXPERIMENT=smoke

test: $(READY)
	$(PYTEST) -m "not slow and not browser and not faults and not slurm"
	@$(MAKE) --no-print-directory smoke

slow: $(READY)
	$(PYTEST) -rs --durations 15 -m "slow and not alone"
	$(BIN)/pytest -m alone tests/memory tests/training

# One at a time: they measure nothing, but time their faults by what a free machine does.
test-faults: $(READY)
	$(BIN)/pytest -m faults -v tests/test_faults.py

# A real Slurm on this machine, of Debian's packages; stopped at the end.
test-slurm:
	@command -v slurmctld sbatch munged > /dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge; } > /dev/null
	@$(MAKE) --no-print-directory PROFILE=slurm setup
	.venv-slurm/bin/pytest -m slurm -v tests/test_slurm.py

browser: smoke
	$(BIN)/pytest -m browser tests/report tests/sizing tests/test_site.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile workflow/Snakefile
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m benchmarks.prose

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt Snakefile workflow/Snakefile

schema: $(READY)
	$(BIN)/peftscope schema > experiments/spec.schema.json

docs: $(READY)
	$(BIN)/python -m benchmarks.architecture
	$(BIN)/python -m benchmarks.shown

publish: $(READY)
	$(BIN)/peftscope publish $(EXPERIMENT)

benchmark-scale: $(READY)
	$(BIN)/python -m benchmarks.scale

# TUNERS="vera loha": only these.
tuners: $(READY)
	$(BIN)/python -W ignore -m benchmarks.tuners $(TUNERS)

agreement: $(READY)
	$(BIN)/python -W ignore -m benchmarks.agreement

speed: $(READY)
	$(BIN)/python -m benchmarks.speed

# What others estimate is asked in environments of their own; over 1 GB the first time. The same command goes on
# after a stop.
scorecard: $(READY)
	$(BIN)/python -W ignore -m benchmarks.scorecard

peft-comparison: $(READY)
	$(BIN)/python -m benchmarks.peft_comparison

# Pyodide and wheels are fetched with npm and pip, by checksums. A link that leads nowhere fails.
site: $(READY)
	rm -rf site
	$(BIN)/python -m calculator.build
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --conf-dir docs --doctree-dir resources/doctrees . site

claims: $(READY)
	$(BIN)/peftscope fetch smollm2-135m
	$(BIN)/peftscope fetch minilm
	$(BIN)/peftscope make-task two-digit-sums
	$(BIN)/peftscope claims --write

# RUNS=20: only so many, drawn at random.
verify: $(READY)
	$(BIN)/peftscope verify $(EXPERIMENT) $(if $(RUNS),--runs $(RUNS))

# In pieces of under nine minutes; the same command goes on. DEVICE=cpu: a small model shows the instrument, and
# DEVICE=pretended lets it stand in for a card. Both prove nothing about one.
gpu-first gpu-check: DEVICE ?= cuda
gpu-first gpu-check: export PEFTSCOPE_DEVICE = $(DEVICE:pretended=cuda)
gpu-first gpu-check: export PYTHONPATH := $(if $(filter pretended,$(DEVICE)),$(abspath tests/pretended),$(PYTHONPATH))
gpu-first: CHECK = gpu-first$(if $(filter-out cuda,$(DEVICE)),-toy)
gpu-check: CHECK = gpu-check$(if $(filter-out cuda,$(DEVICE)),-cpu)
gpu-first gpu-check: $(READY)
	$(BIN)/peftscope sweep $(CHECK) --minutes 8; swept=$$?; $(BIN)/peftscope report $(CHECK) && exit $$swept

# Every file of every package, for all systems. torch stays a range: pip then takes the build that fits the machine.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	.venv-lock/bin/uv pip compile pyproject.toml --extra all --extra dev --extra docs --universal --python-version 3.11 \
	  --generate-hashes --no-emit-package torch --no-header --no-annotate --quiet --output-file requirements.lock
	rm -rf .venv-lock

# Asks a database of known vulnerabilities; what it could not ask about fails too.
audit: $(READY)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --requirement requirements.lock
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > .venv-audit/torch.txt
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .venv-audit/torch.txt

# What is installed, for a release: CycloneDX.
sbom: $(READY)
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet cyclonedx-bom
	.venv-sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json

# The oldest and the newest torch, transformers and peft that pyproject.toml allows, without the lock.
test-oldest: OLDEST := torch==2.9.* transformers==5.24.* peft==0.21.*
test-oldest test-newest:
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet --progress-bar on $(OLDEST) --editable '.[all,dev]'
	OMP_NUM_THREADS=1 .venv-$@/bin/pytest --numprocesses logical --maxprocesses 4 --dist worksteal \
	  -m "not slow and not browser and not faults and not slurm"

clean:
	rm -rf .snakemake results/smoke reports/smoke site build dist
