# Coppice. `make demo` and `make test` are all a new user needs; `make help` lists the rest.
# $(call find_python,3.11): a Python of that version that runs; pyenv has commands that do not, so its folders come second.
find_python = $(shell python$(1) -c '' 2>/dev/null && echo python$(1) || ls -d $(HOME)/.pyenv/versions/$(1).*/bin/python$(1) 2>/dev/null | tail -n 1)
PYTHON   ?= $(call find_python,3.11)
VENV     ?= .venv
PIP_ARGS ?=
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.ready
RUN      ?= runs/demo
# A GPU machine brings its own torch.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,python3)
# More for gpu_check.py: GPU_ARGS="--sections machine,train".
GPU_ARGS ?=
# The 3.12 environment of `make test-latest`.
PYTHON312 ?= $(call find_python,3.12)
VENV312   := .venv312
export OMP_NUM_THREADS ?= 1

.PHONY: help setup corpus demo test test-slow test-slurm test-faults test-latest test-te check bench gpu-check study-small report compare clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## prepare .venv from exact constraints

$(STAMP): pyproject.toml constraints/py311.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 is not installed: install it, or name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints/py311.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints/py311.txt -e '.[dev]'
	@touch $@

corpus: runs/corpus/stdlib.json  ## tokenise the text of Python's own standard library

runs/corpus/stdlib.json: | $(STAMP)
	@mkdir -p runs/corpus
	$(BIN)/python -m train.corpus stdlib --output runs/corpus/stdlib

demo: setup corpus  ## train a real expert-parallel MoE on 2 CPU processes and grow it (FRESH=1 starts anew, keeping the old run)
	@FRESH=$(FRESH) RUN=$(RUN) VENV=$(VENV) sh launch/demo.sh

test: setup  ## the fast test suite (what CI runs)
	$(BIN)/python -m pytest -m "not slow and not slurm" --durations=15

test-slow: setup corpus  ## long proofs: every layout
	$(BIN)/python -m pytest -m slow --timeout 1800

test-slurm: setup  ## a real SLURM on this machine: requeues, preemption, a lost node (needs Debian's packages, or root to install them)
	@PATH="$$PATH:/usr/sbin"; for name in slurmctld slurmd sbatch; do command -v $$name >/dev/null || missing=$$name; done; \
	[ -z "$$missing" ] || { command -v apt-get >/dev/null && apt-get -q update && DEBIAN_FRONTEND=noninteractive \
		apt-get install -q -y --no-install-recommends slurmctld slurmd slurm-client; } \
	|| { echo "error: $$missing is not installed and could not be: install slurmctld, slurmd and slurm-client" >&2; exit 1; }
	$(BIN)/python -m pytest -m slurm --durations=5 tests/launch/test_slurm_real.py

test-faults: setup  ## hundreds of kills, corruptions and faults of disks and clocks in whole runs (about half an hour)
	$(BIN)/python -m pytest tests/faults tests/train/test_corruption.py tests/train/test_stopping.py tests/train/test_saving.py

$(VENV312)/.ready: pyproject.toml constraints/py312.txt
	@test -n "$(PYTHON312)" || { echo "error: Python 3.12 is not installed: install it, or name one with make PYTHON312=..." >&2; exit 1; }
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints/py312.txt torch
	$(VENV312)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints/py312.txt -e '.[dev]'
	@touch $@

test-latest: $(VENV312)/.ready  ## the fast suite on Python 3.12 and the newest megatron-core
	$(VENV312)/bin/python -m pytest -m "not slow and not slurm" --durations=15

test-te:  ## Transformer Engine's modules, built and never run, so without a GPU too (GPU_PYTHON: one that has it)
	$(GPU_PYTHON) -m pytest -m requires_te tests/model/

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup corpus  ## benchmarks/: every measured claim, side by side (about half an hour)
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/grouped_experts.py
	$(BIN)/python benchmarks/fingerprints.py
	$(BIN)/python benchmarks/family_routing.py
	$(BIN)/python benchmarks/live_switch.py
	$(BIN)/python benchmarks/simulated_switch.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/observation.py

gpu-check: ## verify and measure on this machine's GPUs everything that lacks a GPU figure (under 8 minutes; GPU_PYTHON=python3 by default)
	@sh benchmarks/gpu_setup.sh "$(GPU_PYTHON)"
	PYTHONPATH="gpu-bundle/site:$$PYTHONPATH" $(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_ARGS)

study-small: setup corpus  ## fixed E, grown, and fixed mE at the same tokens: gap closure and jumps (about 25 minutes)
	$(BIN)/python benchmarks/study_small.py

report: setup  ## redraw RUN/report.html
	$(BIN)/python -m train.report $(RUN)

compare: setup  ## hold RUNS="runs/a runs/b" against each other in comparison.html
	@test -n "$(RUNS)" || { echo 'error: name the runs: make compare RUNS="runs/a runs/b"' >&2; exit 1; }
	$(BIN)/python -m train.report compare $(RUNS)

clean:  ## remove environments and caches, never runs
	rm -rf $(VENV) $(VENV312) .pytest_cache .mypy_cache .ruff_cache *.egg-info
