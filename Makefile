# Two commands do everything: `make demo` and `make test`. `make help` lists the others.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
FARSEER := $(BIN)/farseer
# of three tests, one waits most of the time: for SLURM, or until something has to have failed
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal -q -rs

CONF ?= $(or $(wildcard var/demo.yaml),conf/demo.yaml)
RUN ?=
SET ?=
SITE ?=
SRC ?=
DST ?=

# A variable that no target reads is misspelt, and a switch is on (=1) or left out.
SWITCHES := AFRESH APPEND DALI_INDEX EVENTS FOLLOW FORCE FULL IGNORE_UNKNOWN IN_PLACE JSON KEEP_FEATURES NOW \
  PROBE VERIFY WATCH
KNOWN := $(SWITCHES) PYTHON CONF RUN SET SITE SRC DST AGAINST BANK EVERY FAULT FROM HELD_OUT IMAGES_PER_S KEY LINES LIST N \
  NEAR OUT SAMPLES SAMPLE_BYTES SEED SIZE STEP STORE TO WORKERS
given := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(KNOWN) MAKE% -% AWS_% PIP_% SLURM_% WANDB_%,$(given)),$(error $(name)= is read by no target; there are $(sort $(KNOWN))))
$(foreach name,$(SWITCHES),$(if $(filter-out 1,$($(name))),$(error $(name)=$($(name)): say $(name)=1, or leave it out)))
# Nor does a target read what another one does: that would be passed over without a word.
lines_of = sed -n '/^$(1):/,/^$$/p' $(firstword $(MAKEFILE_LIST)) | sed 's/run_option/RUN/; s/site_option/SITE/' | grep -ow '[A-Z_]*' | sort -u
read := $(foreach goal,$(MAKECMDGOALS),$(shell $(call lines_of,$(goal))))
$(if $(MAKECMDGOALS),$(foreach name,$(filter-out PYTHON $(read),$(filter $(KNOWN),$(given))),$(error $(name)= is not read by make $(MAKECMDGOALS); it reads $(or $(sort $(filter $(KNOWN),$(read))),no variable))))
export SET KEY # read by the shell, which leaves quotes in them alone

run_option = --run "$(or $(RUN),$(error say which run: make $@ RUN=name))"
site_option = $(if $(SITE),--site "$(SITE)")
flag = $(if $($(1)),--$(2))

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-13s %s\n", $$1, $$2}'

.venv/stamp: constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; make PYTHON=python3.12 takes another"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv; as root: apt install python3-venv"; exit 2; }
	@echo "Installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[local,test]'
	@touch $@

.PHONY: slurm
slurm:
	@jobs/install_slurm.sh

.PHONY: demo
demo: .venv/stamp slurm ## the whole product on this machine, in six to ten minutes (SRC= a folder of your photographs)
	@$(FARSEER) demo --set "$$SET" $(if $(SRC),--src "$(SRC)")

.PHONY: test
test: .venv/stamp slurm ## every test, with a real S3 server and a real SLURM
	@$(PYTEST) -m "not slow"
	@$(PYTEST) -m slow

.PHONY: test-fast
test-fast: .venv/stamp ## what one runs while working: under three minutes
	@$(PYTEST) -m "not slow"

.PHONY: lint
lint: .venv/stamp ## style, types, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config setup.cfg --no-cache

.PHONY: bench
bench: .venv/stamp ## measure, beside a peer in the same run; figures in var/bench.json
	@for part in loader colour from_s3 step monitor order stream save status dashboard evaluate; do $(BIN)/python -m bench.$$part; done

.PHONY: bench-gpu
bench-gpu: .venv/stamp ## measure the loader on a GPU; table in var/bench-gpu.json
	@$(BIN)/python -m bench.gpu

.PHONY: shards
shards: .venv/stamp ## pack SRC= into DST= (SET= APPEND=1 DALI_INDEX=1 WORKERS= SITE=; IN_PLACE=1: only index tars)
	@$(FARSEER) shards "$(or $(SRC),$(error say what to pack: make shards SRC=folder DST=s3://bucket/folder))" "$(or $(DST),$(error say where to: DST=s3://bucket/folder))" $(site_option) --set "$$SET" $(if $(WORKERS),--workers "$(WORKERS)") $(call flag,APPEND,append) $(call flag,IN_PLACE,in-place) $(call flag,DALI_INDEX,dali-index) $(call flag,JSON,json)

.PHONY: verify
verify: .venv/stamp ## whether the shard set DST= is whole (FULL=1: every image decoded; AFRESH=1 WORKERS= OUT=)
	@$(FARSEER) verify "$(or $(DST),$(error say which set: make verify DST=s3://bucket/folder))" $(site_option) $(call flag,FULL,full) $(call flag,AFRESH,afresh) $(if $(WORKERS),--workers "$(WORKERS)") $(if $(OUT),--out "$(OUT)") $(call flag,JSON,json)

.PHONY: preview
preview: .venv/stamp ## one page of the shard set DST=: pictures, sizes, kinds, what was refused (TO=file.html)
	@$(FARSEER) preview "$(or $(DST),$(error say which set: make preview DST=s3://bucket/folder))" $(site_option) $(if $(TO),--to "$(TO)") $(call flag,JSON,json)

.PHONY: dedup
dedup: .venv/stamp ## what DST= has twice, or an evaluation set has (AGAINST="s3://.. s3://.." NEAR=bits OUT=folder)
	@$(FARSEER) dedup "$(or $(DST),$(error say which set: make dedup DST=s3://bucket/folder))" $(site_option) $(if $(AGAINST),--against $(AGAINST)) $(if $(NEAR),--distance "$(NEAR)") $(if $(OUT),--out "$(OUT)") $(call flag,JSON,json)

.PHONY: remove
remove: .venv/stamp ## never show again what LIST=file names: keys, sources, sha256 (DST= IGNORE_UNKNOWN=1 FORCE=1)
	@$(FARSEER) remove "$(or $(DST),$(error say from where: make remove DST=s3://bucket/folder LIST=file))" "$(or $(LIST),$(error say what: LIST=file))" $(site_option) $(call flag,IGNORE_UNKNOWN,ignore-unknown) $(call flag,FORCE,force) $(call flag,JSON,json)

.PHONY: compact
compact: .venv/stamp ## erase the bytes of what was removed from the shard set DST=; ids stay
	@$(FARSEER) compact "$(or $(DST),$(error say which set: make compact DST=s3://bucket/folder))" $(site_option) $(call flag,JSON,json)

.PHONY: seen
seen: .venv/stamp ## whether RUN= has learnt from the image KEY= (a key, source or sha256), and at which steps
	@$(if $(KEY),,$(error say which image: make seen KEY=000012-000345 RUN=name))$(FARSEER) seen "$$KEY" $(run_option) $(site_option) $(call flag,JSON,json)

.PHONY: config
config: .venv/stamp ## every key of a config, a site, a packing: its default, and what it means (KEY=optim JSON=1)
	@$(FARSEER) config --key "$$KEY" $(call flag,JSON,json)

.PHONY: plan
plan: .venv/stamp ## what a run would do and cost, or why it cannot (CONF= SITE= SAMPLES= IMAGES_PER_S= JSON=1)
	@$(FARSEER) plan "$(CONF)" $(site_option) --set "$$SET" $(if $(RUN),--run "$(RUN)") $(if $(IMAGES_PER_S),--images-per-s "$(IMAGES_PER_S)") $(if $(SAMPLES),--samples "$(SAMPLES)") $(if $(SAMPLE_BYTES),--sample-bytes "$(SAMPLE_BYTES)") $(call flag,JSON,json)

.PHONY: submit
submit: .venv/stamp ## start a run, or go on with it (CONF= RUN= SITE= SET=, FORCE=1; FROM=run@step or a file)
	@$(FARSEER) submit "$(CONF)" $(run_option) $(site_option) --set "$$SET" $(call flag,FORCE,force) $(if $(FROM),--from "$(FROM)")

.PHONY: resume
resume: .venv/stamp ## go on with a run that exists, under its own config (RUN=)
	@$(if $(filter CONF SET FORCE FROM,$(given)),$(error a run goes on under its own config: make submit CONF= RUN= SET= FORCE=1 changes it))$(FARSEER) resume $(run_option) $(site_option)

.PHONY: status
status: .venv/stamp ## all runs, or RUN="a b": how far, how fast, what to look at (WATCH=1 JSON=1 STORE=s3://..)
	@$(FARSEER) status $(if $(RUN),--run "$(RUN)") $(site_option) $(if $(STORE),--store "$(STORE)") $(call flag,JSON,json) $(call flag,WATCH,watch)

.PHONY: doctor
doctor: .venv/stamp ## what SITE= can do of what CONF= asks: ok, or what to do (PROBE=1: from its nodes)
	@$(FARSEER) doctor "$(CONF)" $(site_option) --set "$$SET" $(call flag,PROBE,probe) $(call flag,JSON,json)

.PHONY: logs
logs: .venv/stamp ## the logs of RUN=, what failed first, by time (FOLLOW=1, EVENTS=1, LINES=)
	@$(FARSEER) logs $(run_option) $(site_option) $(call flag,FOLLOW,follow) $(call flag,EVENTS,events) $(if $(LINES),--lines "$(LINES)")

.PHONY: profile
profile: .venv/stamp ## what the next steps of RUN= spend their time on, and a trace of them for ui.perfetto.dev
	@$(FARSEER) profile $(run_option) $(site_option)

.PHONY: cancel
cancel: .venv/stamp ## stop RUN= after a last checkpoint (NOW=1: without)
	@$(FARSEER) cancel $(run_option) $(site_option) $(call flag,NOW,now)

.PHONY: checkpoints
checkpoints: .venv/stamp ## the checkpoints of RUN= in the store (VERIFY=1: every byte, JSON=1)
	@$(FARSEER) checkpoints $(run_option) $(site_option) $(call flag,VERIFY,verify) $(call flag,JSON,json)

.PHONY: evaluate
evaluate: .venv/stamp ## neighbours, linear probe of RUN= on labelled sets (BANK= HELD_OUT= STEP= WORKERS= EVERY=)
	@$(FARSEER) evaluate $(run_option) $(site_option) "$(or $(BANK),$(error say what to learn from: BANK=s3://...))" "$(or $(HELD_OUT),$(error say what to ask: HELD_OUT=s3://...))" $(if $(STEP),--step "$(STEP)") $(if $(SIZE),--size "$(SIZE)") $(if $(WORKERS),--workers "$(WORKERS)") $(if $(EVERY),--every "$(EVERY)") $(call flag,KEEP_FEATURES,keep-features) $(call flag,JSON,json)

.PHONY: report
report: .venv/stamp ## evaluate RUN= and write its report, one page (BANK= HELD_OUT= as above, TO=file.html)
	@$(FARSEER) report $(run_option) $(site_option) "$(or $(BANK),$(error say what to learn from: BANK=s3://... (make dashboard needs none)))" "$(or $(HELD_OUT),$(error say what to ask: HELD_OUT=s3://...))" $(if $(TO),--to "$(TO)")

.PHONY: dashboard
dashboard: .venv/stamp ## one page of RUN="a b", or of the newest runs: curves, scores, differences (WATCH=1 STORE= TO=)
	@$(FARSEER) dashboard $(if $(RUN),--run "$(RUN)") $(site_option) $(if $(STORE),--store "$(STORE)") $(if $(TO),--to "$(TO)") $(call flag,WATCH,watch)

.PHONY: export
export: .venv/stamp ## the trunk of RUN= as a folder that timm reads (STEP= TO=folder or s3://.. JSON=1)
	@$(FARSEER) export $(run_option) $(site_option) $(if $(STEP),--step "$(STEP)") $(if $(TO),--to "$(TO)") $(call flag,JSON,json)

.PHONY: replay
replay: .venv/stamp ## what RUN= saw at STEP=: images and crops, checked by the hashes of its row (TO=file.html)
	@$(FARSEER) replay $(run_option) $(site_option) --step "$(or $(STEP),$(error say which step: make replay RUN=name STEP=1000))" $(if $(TO),--to "$(TO)")

.PHONY: sync
sync: .venv/stamp ## send to W&B what it has not got of RUN=: recorded offline, or lost while W&B was away
	@$(FARSEER) sync $(run_option) $(site_option)

.PHONY: chaos
chaos: .venv/stamp slurm ## N= faults against short real runs on a cluster of their own (SEED=, FAULT=)
	@$(FARSEER) chaos --trials "$(or $(N),5)" --seed "$(or $(SEED),0)" $(if $(FAULT),--fault "$(FAULT)")

.PHONY: cluster-up
cluster-up: .venv/stamp slurm ## a real S3 server and a real SLURM on this machine: SITE=local
	@$(FARSEER) cluster up

.PHONY: cluster-down
cluster-down: ## stop them; what is stored stays
	@if [ -x $(FARSEER) ] && [ -d var/cluster -o -d var/chaos ]; then $(FARSEER) cluster down; fi

.PHONY: clean
clean: cluster-down ## remove .venv and var
	@rm -rf .venv var *.egg-info
