PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CLIP := fixtures/clips/english-4.ogg
CHECKPOINT := fixtures/nano.pt
DEVICE := cpu

.PHONY: help setup demo lint test test-faults soak perf perf-gate clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile

setup: $(INSTALLED)  ## install into .venv, with PYTHON (python3 unless given)

demo: $(INSTALLED)  ## transcribe a clip, then compare every block with PyTorch
	$(BIN)/maxwhisper transcribe $(CLIP) --model $(CHECKPOINT) --output_format vtt --output_dir build/demo
	$(BIN)/python -m reference --checkpoint $(CHECKPOINT)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then every test
	$(BIN)/pytest tests --benchmark-disable

test-faults: $(INSTALLED)  ## the judge on trial: every fault, in every dtype (nightly)
	$(BIN)/pytest tests/parity/test_faults.py --size fixture --dtype all --faults all

soak: $(INSTALLED)  ## the default comparisons 100 times on fresh random inputs; a false alarm fails
	$(BIN)/python -m reference.soak

perf: $(INSTALLED)  ## benchmark every block, MAX beside PyTorch
	$(BIN)/pytest tests/perf --benchmark-autosave

perf-gate: $(INSTALLED)  ## fail if a block is slower than in BASE: make perf-gate BASE=main [DEVICE=gpu]
	@test -n "$(BASE)" || { echo "make perf-gate needs a git revision: make perf-gate BASE=main"; exit 1; }
	$(BIN)/python -m reference.perf.gate "$(BASE)" --device $(DEVICE)

clean:  ## remove what the other targets made, .venv too
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find maxwhisper reference tests fixtures -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("make setup needs Python 3.11, 3.12 or 3.13; \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
