# `make help` lists the targets. Packages go to $(VENV), runs to runs/; the `datasets` library keeps
# its own cache of prepared text in HF_HOME (~/.cache/huggingface).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,test-trl,plots,compare,trackers
# What the floor environment pins; see `make test-floor`.
FLOOR ?= transformers==5.17.*
ARGS ?=
# Tests run in so many processes at a time, each on one thread.
WORKERS ?= 2
test test-distributed: export OMP_NUM_THREADS = 1

.PHONY: help install demo test test-distributed test-floor bench bench-peers gpu-check lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /|/' | while IFS='|' read -r target text; do \
		printf '  make %-16s %s\n' "$$target" "$$text"; done

install: $(VENV)/installed  ## Create $(VENV) with the package, tests and plots

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]' $(PIN)
	touch $@

demo: install  ## Train a small GPT-2 with --optim sophia on real text (a few minutes on two cores)
	$(VENV)/bin/python recipes/pretrain_gpt2.py $(ARGS)

test: install  ## Run all tests; ARGS='-k name' picks some
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-distributed: install  ## Run the tests that train in several processes
	$(VENV)/bin/python -m pytest -m distributed $(ARGS)

test-floor:  ## Run all tests on the oldest transformers that is tested, in its own environment
	$(MAKE) test VENV=.venv-floor PIN='$(FLOOR)'

bench: install bench-peers  ## Measure steps, refreshes, samplers, noise and whole runs (half an hour on two cores)
	$(VENV)/bin/python benchmarks/step.py --threads 1 2 --peers .venv-peers/bin/python --output benchmarks/results/step_cpu.json
	$(VENV)/bin/python benchmarks/refresh.py --output benchmarks/results/refresh_cpu.json
	$(VENV)/bin/python benchmarks/sampler.py --output benchmarks/results/sampler_cpu.json
	$(VENV)/bin/python benchmarks/hessian_noise.py --output benchmarks/results/hessian_noise_cpu.json
	$(VENV)/bin/python benchmarks/train.py --output benchmarks/results/train_cpu.json
	$(VENV)/bin/python benchmarks/train.py --accumulation 4 --steps 20 --output benchmarks/results/train_accumulated_cpu.json

# Others' packages pin what this one does not; labml-nn would replace its torch.
bench-peers: .venv-peers/installed
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet 'torch<2.14' 'numpy<3' pytorch_optimizer
	.venv-peers/bin/python -m pip install --quiet --no-deps labml-nn labml labml-helpers
	touch $@

gpu-check:  ## Test and measure on a CUDA device, within nine minutes and without a network
	$(PYTHON) benchmarks/gpu_check.py

lint: install  ## Check style and formatting with ruff
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install  ## Format the code with ruff
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove environments, caches and runs
	rm -rf .venv .venv-floor .venv-peers .pytest_cache .ruff_cache build runs *.egg-info
