# Thin: each target makes the environment if it is missing and hands over to `python -m …`, whose --help (train: --help-all) is complete.
VENV     ?= .venv
PYTHON   ?= python3
PY       := $(VENV)/bin/python
STAMP    := $(VENV)/.installed
VENV_BENCH ?= .venv-bench

OUT      ?= runs/demo
DATA     ?=
STORE    ?=
LATENTS  ?= sd-vae-ft-mse
FEATURES ?= dinov2-vitb14
RESOLUTION ?= 256
PRESET   ?= sit-xl-2
RUN      ?=
GPUS     ?= 1
N        ?= 50000
FILE     ?=
IMAGES   ?=
REFERENCE ?=
ENCODER  ?= inception
RUNS     ?=
PROTOCOL ?=
ARGS     ?=
export RAY_ADDRESS ?=

# A variable as one word of the shell, whatever its characters: not expanded by make, quoted for sh.
quote = '$(subst ','\'',$(value $(1)))'
# Those of the variables that were named on the command line or in the environment.
named = $(strip $(foreach name,$(1),$(if $(filter command environment,$(firstword $(origin $(name)))),$(name))))
on_line = $(strip $(foreach name,$(1),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))

.PHONY: help env demo precompute train generate evaluate score analyse ablate report export test test-quick test-all bench-env bench lint format clean
help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 14

env: $(STAMP)  ## make the environment (every other target does, when it is missing)
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## both stages on digits over photographs, five minutes
	$(PY) -m pipeline demo --out $(call quote,OUT) $(ARGS)

precompute: $(STAMP)  ## stage one: DATA=folder STORE=root [LATENTS FEATURES RESOLUTION RAY_ADDRESS ARGS]
# Only a bare `make precompute` is the demo's: whatever is named means the real job, and what it lacks is an error.
ifeq ($(call named,DATA STORE LATENTS FEATURES RESOLUTION ARGS)$(call on_line,RAY_ADDRESS),)
	$(PY) -m pipeline demo --out $(call quote,OUT) --only-precompute
else
	$(PY) -m pipeline precompute --data $(call quote,DATA) --store $(call quote,STORE) \
	  --latents $(call quote,LATENTS) --features $(call quote,FEATURES) --resolution $(RESOLUTION) $(ARGS)
endif

TRAIN = train --store $(call quote,STORE) --preset $(PRESET) $(if $(value RUN),--run $(call quote,RUN)) $(ARGS)
train: $(STAMP)  ## stage two: STORE=root [PRESET RUN GPUS RAY_ADDRESS ARGS]; GPUS of this machine, or of the cluster
ifeq ($(call named,STORE PRESET RUN GPUS ARGS)$(call on_line,RAY_ADDRESS),)
	$(PY) -m trainer train --store $(call quote,OUT)/store --preset sit-tiny-2 --run $(call quote,OUT)/train
else ifeq ($(value STORE),)
	$(PY) -m trainer train --store ''
else ifneq ($(strip $(RAY_ADDRESS)),)
	$(PY) -m pipeline launch --workers $(GPUS) -- $(TRAIN)
else ifeq ($(GPUS),1)
	$(PY) -m trainer $(TRAIN)
else
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(GPUS) -m -- trainer $(TRAIN)
endif

generate: $(STAMP)  ## draw images: RUN=folder [N GPUS ARGS="--format npz --guidance 1.8"]
ifeq ($(GPUS),1)
	$(PY) -m trainer generate $(call quote,RUN) --n $(N) $(ARGS)
else
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(GPUS) -m -- trainer generate $(call quote,RUN) --n $(N) $(ARGS)
endif

evaluate: $(STAMP)  ## FID and more: IMAGES=folder or .npz REFERENCE=.npz, folder or store [ENCODER RUN ARGS]
	$(PY) -m trainer evaluate $(call quote,IMAGES) --reference $(call quote,REFERENCE) \
	  --encoder $(call quote,ENCODER) $(if $(value RUN),--run $(call quote,RUN)) $(ARGS)

SCORE = score $(call quote,RUN) --n $(N) --encoder $(call quote,ENCODER) \
  $(if $(value PROTOCOL),--protocol $(call quote,PROTOCOL)) $(if $(value REFERENCE),--reference $(call quote,REFERENCE)) $(ARGS)
score: $(STAMP)  ## draw what is missing, evaluate, record, report: RUN=folder [PROTOCOL=repa REFERENCE N GPUS ENCODER ARGS]
ifeq ($(GPUS),1)
	$(PY) -m trainer $(SCORE)
else
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(GPUS) -m -- trainer $(SCORE)
endif

analyse: $(STAMP)  ## the paper's analysis figures: RUNS="runs/a runs/b" [ARGS]
	$(PY) -m trainer analyse $(RUNS) $(ARGS)

ablate: $(STAMP)  ## the runs of an ablation: FILE=yaml STORE=root [RAY_ADDRESS ARGS]
	$(PY) -m trainer ablate $(call quote,FILE) --store $(call quote,STORE) $(ARGS)

report: $(STAMP)  ## one HTML page about runs: RUNS="runs/a runs/b" [ARGS="--out report.html"]
	$(PY) -m trainer report $(RUNS) $(ARGS)

export: $(STAMP)  ## a run for other programs: RUN=folder [ARGS="--to safetensors"]
	$(PY) -m trainer export $(call quote,RUN) $(ARGS)

# Most of the time goes into processes that the tests start; a file stays with one worker, for what its tests share.
# Three for two cores: what a test waits for leaves room.
PYTEST = $(PY) -m pytest -n $$(( $$(nproc) < 8 ? $$(nproc) + 1 : 8 )) --dist loadfile
test: $(STAMP)  ## the tests, five to ten minutes on two cores
	$(PYTEST) $(ARGS)

test-quick: $(STAMP)  ## those of them that start no process
	$(PYTEST) --quick $(ARGS)

test-all: $(STAMP)  ## and the slow ones
	$(PYTEST) -m 'slow or not slow' $(ARGS)

bench-env: $(VENV_BENCH)/.installed  ## the environment of the formats that bench compares with
$(VENV_BENCH)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@

bench: bench-env  ## storage beside its peers: an hour, 10 GB of disk; tables and plots in benchmarks/results
	$(VENV_BENCH)/bin/python -m benchmarks.storage_write
	$(VENV_BENCH)/bin/python -m benchmarks.storage_read $(ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.storage_read --dtype int8 $(ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.storage_read --cache cold $(ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.bookkeeping --stores 1000x512 10000x512

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## ruff's fixes and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the demo's outputs and the caches, not the environment
	rm -rf runs/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
