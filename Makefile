# SPDX-License-Identifier: GPL-2.0-only
#
# make demo    build, boot an emulated ARM64 board and run a language model on
#              memory from the kernel module
# make test    everything that has to pass
#
# `make help` lists the rest.

SHELL := /bin/bash
KERNEL ?= 6.12
K ?=
BENCH ?=

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tensormem
# A new environment when what it is made of changes.
VENV_KEY := $(shell cat pyctl/pyproject.toml tests/requirements.txt | sha256sum | cut -c1-12)
VENV := $(CACHE)/venv-$(VENV_KEY)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready

help:
	@echo 'make demo                        the main job, in an emulated board'
	@echo 'make test                        all tests; a summary at the end'
	@echo 'make test-host                   core and Python, without a guest'
	@echo 'make test-guest KERNEL=6.1 K=kv  the guest suite on one kernel'
	@echo 'make bench BENCH=alloc           instructions beside a peer: build/bench/*.json'
	@echo 'make lint                        style, types, sparse, W=1'
	@echo 'make shell KERNEL=6.12           an interactive guest'
	@echo 'make man                         the man pages of all commands: build/man/'
	@echo 'make pictures                    docs/pictures/, drawn anew from a run in a guest'
	@echo 'make modules                     the module for the running kernel (on a board)'
	@echo 'make clean                       remove build/; the cache stays'

demo:
	@qemu/install-deps demo
	@qemu/guest run --kernel $(KERNEL) --cpus 2 --memory 1G --timeout 600 -- \
		sh -c "tensormem demo && tensormem demo --swap"

test: $(READY)
	@qemu/install-deps test
	@$(PYTHON) tests/run.py

test-host: $(READY)
	@$(PYTHON) tests/run.py host

test-guest: $(READY)
	@$(PYTHON) tests/run.py guest-$(KERNEL) -k '$(K)'

bench:
	@qemu/install-deps demo
	@tests/bench/measure.py $(BENCH)

lint: $(READY)
	@qemu/install-deps lint
	@$(PYTHON) tests/lint.py

shell:
	@qemu/install-deps demo
	@qemu/guest shell --kernel $(KERNEL)

man: $(READY)
	@PYTHONPATH=pyctl/src $(PYTHON) -m tensormem man build/man/man1

pictures: $(READY)
	@qemu/install-deps test
	@$(PYTHON) docs/pictures/draw.py

modules:
	@$(MAKE) -C kmod

$(READY):
	@qemu/install-deps test
	@echo 'make: preparing the Python environment of the tests' >&2
	@rm -rf $(VENV) && python3 -m venv $(VENV)
	@$(PYTHON) -m pip install -q -r tests/requirements.txt
	@touch $@

clean:
	rm -rf build

.PHONY: help demo test test-host test-guest bench lint shell man pictures modules clean
.DEFAULT_GOAL := help
