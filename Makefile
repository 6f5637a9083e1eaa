PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CLIP := fixtures/clips/english-4.ogg
CHECKPOINT := fixtures/nano.pt
REPORTS ?= build/reports
# Processes that tests run in, each with models of its own in some GB of memory.
JOBS ?= 2
TARGETS ?= sm_90a
# What is compiled ahead for GPUs, and compared and timed on them.
SIZE ?= fixture
MODELS ?= $(addprefix random:,tiny base small medium large-v3 turbo)
WHEELS ?= dist
MUTANTS ?= 100
SEED ?= 0
DTYPE ?= float32
ON_GPU = --device gpu --require-gpu $(addprefix --artifacts ,$(ARTIFACTS))
REPORT_DIR = $(or $(REPORT),build/report)
DEVICE := cpu
COMPILED_HEAD = $(or $(ARTIFACTS),build/artifacts/$(TARGETS))
COMPILED_BASE = $(or $(BASE_ARTIFACTS),build/artifacts-base/$(TARGETS))
NEEDS_BASE = @test -n "$(BASE)" || { echo "make $@ needs a git revision: make $@ BASE=main"; exit 1; }

.PHONY: help setup demo lint lint-ci test test-nightly test-peers test-bulk test-x86-64-v3 test-x86-64-v4 test-faults test-mutants soak wheel graph-key compile-gate \
	compile-base kernel-diff doctor gpu-parity gpu-perf gpu-remote gpu-bundle summary merge-gate perf perf-gate growth clean

help:  ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile

setup: $(INSTALLED)  ## install into .venv, with PYTHON (python3 unless given), and compile the kernels

demo: $(INSTALLED)  ## transcribe a clip, then compare every block with PyTorch
	$(BIN)/maxwhisper transcribe $(CLIP) --model $(CHECKPOINT) --output_format vtt --output_dir build/demo
	$(BIN)/python -m reference --checkpoint $(CHECKPOINT)

lint: $(INSTALLED)  ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Comparisons have all cores, as users compute; then all else runs in processes that share the cores out.
define TESTS
$(BIN)/pytest tests/parity $(1) $(addprefix --report ,$(REPORT)); status=$$?; \
$(BIN)/pytest tests/perf tests/unit --benchmark-disable -n $(JOBS) --dist loadgroup $(1) && exit $$status
endef

test: lint  ## lint, then every test, unit tests in JOBS processes; REPORT=DIR writes the report there
	$(call TESTS,)

test-nightly: $(INSTALLED)  ## the tests that are too slow for every merge, and those that time something
	$(BIN)/pytest tests --benchmark-disable --nightly -m nightly
	$(BIN)/pytest tests/unit -m clock

test-peers: $(INSTALLED)  ## what is compared with other engines, which are installed first; a skip fails
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/pytest tests/unit/test_compare*.py tests/unit/test_checkpoints_in_transformers.py --require-peers

test-bulk: $(INSTALLED)  ## what transcribes archives, on Ray Data itself; a skip fails
	$(BIN)/pytest tests/unit/test_bulk*.py --nightly --require-peers

test-x86-64-v3: $(INSTALLED)  ## every test as on a CPU without AVX-512
	$(call TESTS,--cpu x86-64-v3)

test-x86-64-v4: $(INSTALLED)  ## every test as on a CPU with AVX-512 but without AMX
	$(call TESTS,--cpu x86-64-v4)

test-faults: $(INSTALLED)  ## the judge on trial: every fault, in every dtype (nightly)
	$(BIN)/pytest tests/parity/test_faults.py --size fixture --dtype all --faults all

test-mutants: $(INSTALLED)  ## small faults in our own sources: which the suite sees [MUTANTS=100] [SEED=0]
	$(BIN)/python -m reference.mutants --number $(MUTANTS) --seed $(SEED)

soak: $(INSTALLED)  ## the default comparisons 100 times on fresh random inputs; a false alarm fails
	$(BIN)/python -m reference.soak

perf: $(INSTALLED)  ## benchmark every block, MAX beside PyTorch
	$(BIN)/pytest tests/perf --benchmark-autosave

# Of the model that compile-gate compiles where it is given graphs, of tiny where it is not.
perf-gate: SIZE = $(if $(ARTIFACTS)$(BASE_ARTIFACTS),fixture,tiny)
perf-gate: $(INSTALLED)  ## fail if a block is slower than in BASE [DEVICE=gpu] [ARTIFACTS=dir] [BASE_ARTIFACTS=dir]
	$(NEEDS_BASE)
	$(BIN)/python -m reference.perf.gate "$(BASE)" $(addprefix --output ,$(addsuffix /perf-gate.md,$(REPORT))) \
	$(addprefix --artifacts ,$(ARTIFACTS)) $(addprefix --base_artifacts ,$(BASE_ARTIFACTS)) \
	--device $(DEVICE) --size $(SIZE) --dtype $(DTYPE)

growth: $(INSTALLED)  ## time and memory against audio length, batch, model size and threads, beside PyTorch; to build/growth
	$(BIN)/python -m reference.perf.growth

lint-ci: $(INSTALLED)  ## actionlint, shellcheck and hadolint, which are installed first
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ci]'
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck
	$(BIN)/shellcheck scripts/*.sh scripts/container/*.sh .ci/run
	$(BIN)/hadolint scripts/container/Containerfile*

# Those of OpenAI's checkpoints, in float16. Those of a model take some minutes.
wheel: $(INSTALLED)  ## a wheel in dist, with graphs compiled for any x86-64-v3 CPU [MODELS="random:tiny ..."]
	rm -rf build/wheel && mkdir -p build/wheel
	cp -R maxwhisper pyproject.toml README.md LICENSE build/wheel
	for model in $(MODELS); do MAXWHISPER_CPU=x86-64-v3 $(BIN)/maxwhisper compile --model $$model --target host \
	--out build/wheel/maxwhisper/portable/$$(basename $$model .pt | tr : -) || exit 1; done
	$(BIN)/pip wheel --no-deps --wheel-dir $(WHEELS) --config-settings=--build-option=--plat-name=manylinux_2_34_x86_64 build/wheel

graph-key: $(INSTALLED)  ## what the compile cache may be kept under: the version of MAX and a hash of the graphs' sources
	@echo "key=$$($(BIN)/python -m maxwhisper.engine.artifacts)"

compile-gate: $(INSTALLED)  ## compile every graph for GPUs that need not be there: make compile-gate TARGETS=sm_80,sm_90a
	$(BIN)/pytest tests/parity --compile-only $(TARGETS) --artifacts build/artifacts --size $(SIZE) --dtype $(DTYPE)

compile-base: $(INSTALLED)  ## the same of the revision BASE, for perf-gate and kernel-diff; to build/artifacts-base
	$(NEEDS_BASE)
	$(BIN)/python -m reference.perf.compile_base "$(BASE)" $(TARGETS) --size $(SIZE) --dtype $(DTYPE)

kernel-diff: $(INSTALLED)  ## how a GPU's kernels differ: make compile-gate compile-base kernel-diff BASE=main
	$(BIN)/python -m reference.kernel_diff $(COMPILED_HEAD) $(COMPILED_BASE) \
	$(addprefix --output ,$(addsuffix /kernel-diff.md,$(REPORT)))

doctor: $(INSTALLED)  ## what keeps MAX from using the GPU, if anything does
	$(BIN)/maxwhisper doctor

gpu-parity: $(INSTALLED)  ## parity on a GPU; ARTIFACTS=build/artifacts/sm_90a uses what compile-gate wrote [K="what -k takes"]
	$(BIN)/pytest tests/parity $(if $(K),-k "$(K)") $(ON_GPU) --size $(SIZE) --dtype $(DTYPE) --report $(REPORT_DIR)

gpu-perf: $(INSTALLED)  ## benchmarks on a GPU; ARTIFACTS and REPORT as for gpu-parity
	mkdir -p $(REPORT_DIR)
	$(BIN)/pytest tests/perf $(ON_GPU) --size $(SIZE) --dtype $(DTYPE) --benchmark-json $(REPORT_DIR)/perf.json

gpu-remote:  ## all of this on another machine: make gpu-remote HOST=user@host [MINUTES=60]
	scripts/gpu-runner.sh --host "$(HOST)" $(addprefix --minutes ,$(MINUTES))

# For Python 3.12, HAS=torch and everything in build/artifacts, unless given.
gpu-bundle: $(INSTALLED)  ## all of this for a machine without network [PYTHON_VERSION=3.12] [HAS=torch,...] [ARTIFACTS=dir]
	$(BIN)/python -m reference.gpu_run.bundle $(addprefix --python ,$(PYTHON_VERSION)) $(if $(filter undefined,$(origin HAS)),,--has "$(HAS)") \
	$(addprefix --artifacts ,$(ARTIFACTS))

summary:  ## print the summary of a report
	@cat $(REPORT_DIR)/summary.md

merge-gate:  ## fail unless every job of NEEDS succeeded and compared something; EXCUSED jobs may have been skipped
	python3 -m reference.merge_gate --needs "$$NEEDS" --excused "$$EXCUSED" \
	--report cpu-parity:cpu:$(REPORTS)/report-cpu/report.json \
	--report gpu-parity:gpu:$(REPORTS)/report-gpu/report.json \
	--report gpu-perf:gpu:$(REPORTS)/perf-gpu/perf.json

clean:  ## remove what the other targets made, .venv too
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find maxwhisper reference tests fixtures -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("make setup needs Python 3.11, 3.12 or 3.13; \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'from maxwhisper.engine.kernel_library import kernel_library; kernel_library()'
	touch $@
