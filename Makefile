# `make help` lists the targets. Each does its own set-up on a fresh clone: a virtual environment in .venv, torch's
# CPU build and the other dependencies as constraints.txt pins them; again only when pyproject.toml or
# constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
# PyPI's torch for Linux is a CUDA build of gigabytes; the CPU builds have an index of their own.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

POCKET ?= .cache/pocket
POCKET_WORK := $(POCKET)/work
# What `make pocket` writes; engine/ritocco/models/pocket replaces the embedded model.
POCKET_OUT ?= $(POCKET)/packed
POCKET_DATA := @lobehub/fluent-emoji-3d@1.1.0
POCKET_FILE := $(POCKET)/lobehub-fluent-emoji-3d-1.1.0.tgz
POCKET_DIGEST := Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==
# cuda: with POCKET_PROCESSES as many GPUs.
POCKET_DEVICE ?= cpu
POCKET_PROCESSES ?= 2
POCKET_VAE_STEPS ?= 2800
POCKET_OTHERS ?= 0.8
POCKET_STAGES ?= 128:1500,256:2650,384:3300,512:2350

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
TRAIN = PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(POCKET_PROCESSES)

.PHONY: help demo test test-all test-gpu lint format notebook bench pocket evaluate judge gallery clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' Makefile | awk -F '|' '{ printf "make %-9s %s\n", $$1, $$2 }'

demo: $(VENV)/core.stamp ## repaint the photograph that ships with ritocco, into demo-output/
	@$(BIN)/ritocco demo --out demo-output

# Two processes of one thread: the quick tests are small, and on a busy machine OpenMP's threads mostly wait for each
# other. A file stays in one process, which makes its exports once.
test: lint ## lint, then the quick tests; what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: lint ## lint, then all tests that need no GPU: full size, second environments
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/dev.stamp ## the tests that need a CUDA device; bring your own build of torch
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/dev.stamp ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

notebook: $(VENV)/notebook.stamp ## run docs/notebook.ipynb again
	$(BIN)/jupyter execute --inplace docs/notebook.ipynb

bench: $(VENV)/bench.stamp ## the benchmarks
	$(BIN)/python -m ritocco_bench

pocket: $(VENV)/pocket.stamp $(POCKET)/package/package.json ## train the embedded model again, into .cache/pocket/packed: hours; resumes where it stopped
	$(TRAIN) -m pocket.autoencoder --assets $(POCKET)/package/assets --work $(POCKET_WORK) --steps $(POCKET_VAE_STEPS) --device $(POCKET_DEVICE)
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m pocket.words --work $(POCKET_WORK)
	PYTHONPATH=benchmarks $(BIN)/python -m pocket.paraphrase --model $(POCKET_WORK)/words --out $(POCKET_WORK)/model
	$(TRAIN) -m pocket.denoiser --assets $(POCKET)/package/assets --work $(POCKET_WORK) --stages $(POCKET_STAGES) --others $(POCKET_OTHERS) --device $(POCKET_DEVICE)
	PYTHONPATH=benchmarks $(BIN)/python -m pocket.pack --work $(POCKET_WORK) --out $(POCKET_OUT)
	PYTHONPATH=benchmarks $(BIN)/python -m pocket.curve --work $(POCKET_WORK) --out $(POCKET)/curve.png

# The rows of an evaluation that was cut short are kept.
evaluate: $(VENV)/pocket.stamp $(POCKET)/package/package.json ## judge the embedded model; QUICK=1 for 256 pixels
	PYTHONPATH=benchmarks $(BIN)/python -m pocket.evaluate --assets $(POCKET)/package/assets \
		--rows $(POCKET)/rows.jsonl $(if $(QUICK),--quick)

judge: $(VENV)/pocket.stamp $(POCKET)/package/package.json ## train the judge again, a quarter of an hour
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m pocket.judge --assets $(POCKET)/package/assets

gallery: $(VENV)/pocket.stamp ## paint the pictures of docs/ again; a quarter of an hour
	PYTHONPATH=benchmarks $(BIN)/python -m pocket.gallery --out docs

clean: ## remove the environment, caches and outputs; downloads and training state in .cache stay
	rm -rf $(VENV) dist demo-output .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find engine kernels export benchmarks tests -name __pycache__ -type d -exec rm -rf {} +

# A command of its own that asks the extra index for torch alone: the other packages come from the usual place.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo 'Python 3.11 to 3.13 is needed; name yours: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps --retries 2 --extra-index-url=$(TORCH_INDEX) torch
	@touch $@

$(VENV)/core.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/core.stamp $@

$(VENV)/bench.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) -e ".[bench]"
	@touch $(VENV)/core.stamp $@

$(VENV)/notebook.stamp: $(VENV)/core.stamp
	$(INSTALL) ipykernel nbclient
	@touch $@

$(VENV)/pocket.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) -e ".[pocket]"
	@touch $(VENV)/core.stamp $@

$(POCKET)/package/package.json:
	mkdir -p $(POCKET)
	npm pack --silent --pack-destination $(POCKET) $(POCKET_DATA)
	openssl dgst -sha512 -binary $(POCKET_FILE) | openssl base64 -A | grep -qxF $(POCKET_DIGEST)
	tar -xzf $(POCKET_FILE) -C $(POCKET)
	@touch $@
