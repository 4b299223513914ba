# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
#
# make demo   set everything up and boot a Linux guest through the REST API
# make serve  leave a daemon running that curl on this machine can drive
# make test   set everything up and run every test tier
# make check  the fast tiers only: style, unit, api
# make bench  the benchmarks
# make fuzz   the fuzzers, FUZZ_SECONDS for each of them
# make soak   kill a guest's whole host SOAK_ROUNDS times, and look for lost writes
# make lab    boot an emulated host that stays: lab/lab exec runs commands there
# make fmt    format the code
# make clean  remove what was built here

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
FUZZ_SECONDS ?= 600
SOAK_ROUNDS ?= 50
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# What the build and the tests use of Debian: a compiler and headers, the lab, fuzzing, style.
APT    := gcc libc6-dev linux-libc-dev python3-dev python3-venv curl iproute2 kmod cpio \
          busybox-static squashfs-tools e2fsprogs btrfs-progs qemu-system-x86 \
          qemu-system-common dmsetup nbdkit clang libclang-rt-14-dev clang-format shellcheck acpica-tools

.PHONY: demo serve test check bench fuzz soak lab fmt setup build guest clean \
        test-style test-unit test-api test-fuzz test-kvm test-guest

# --- set-up

setup: build

# apt-get is asked only for what is missing, so a second run needs neither root nor a network.
$(VENV)/.apt: Makefile
	@mkdir -p $(VENV)
	@missing=$$(for p in $(APT); do \
	   dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	 if [ -n "$$missing" ]; then \
	   echo "installing:" $$missing; \
	   $(SUDO) apt-get -qq update && \
	   DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get -qq install -y --no-install-recommends \
	     $$missing >/dev/null; \
	 fi
	@touch $@

$(VENV)/.pip: pyproject.toml $(VENV)/.apt
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary atheris -e '.[dev]'
	@touch $@

# The C core, rebuilt when one of its sources is newer.
kvm_ffi/_kvm.abi3.so: $(wildcard kvm_ffi/*.cdef kvm_ffi/csrc/*.[ch]) kvm_ffi/build_kvm.py $(VENV)/.pip
	@$(BIN)/python setup.py -q build_ext --inplace --force
	@touch $@

# Compiled here, once: in the lab hosteld would take minutes to do it at each of its starts.
build: kvm_ffi/_kvm.abi3.so
	@$(BIN)/python -m compileall -q api daemon devices kvm_ffi lab bench tests

# --- tests, the fast tiers first

test: check test-fuzz test-kvm test-guest

check: test-style test-unit test-api

test-style: build
	$(PYTEST) tests/style

test-unit: build
	$(PYTEST) tests/unit

test-api: build
	$(PYTEST) tests/api

test-fuzz: build
	@$(BIN)/python -m tests.fuzz.ring_walk --steps 2500000
	$(PYTEST) tests/fuzz

test-kvm: build
	$(PYTEST) tests/kvm

# In the lab, which is a full host wherever this runs; never skipped there.
test-guest: build guest
	@echo "running tests/guest in the lab, an emulated AMD-V host"
	@HOSTEL_GUEST=$$($(BIN)/python -m lab.guests) lab/lab run -m 4096 -t 3600 -- \
	   $(PYTEST) -v --tb=short tests/guest

# --- the main job, by hand and by eye

demo: build guest
	@$(BIN)/python lab/demo.py

serve: build guest
	@$(BIN)/python lab/serve.py

# The kernel, initramfs and disk that guests boot; quick when they are there.
guest: build
	@$(BIN)/python -m lab.guests >/dev/null

# --- speed and memory: ratios against a peer, no timed tests

bench: build guest
	@for name in exits ring limits create memory boot blk vhost_user net vsock; do $(BIN)/python -m bench.$$name || exit 1; echo; done

# Each target keeps its corpus in .cache/fuzz, so that the next run goes on from there.
fuzz: build
	@$(BIN)/python -m tests.fuzz.ring_walk --steps 2500000
	@for target in $$($(BIN)/python -m tests.fuzz.fuzzing --list); do \
	   $(BIN)/python -m tests.fuzz.fuzzing $$target --seconds $(FUZZ_SECONDS) || exit 1; done

soak: build guest
	@$(BIN)/python -m tests.soak.host_kills --rounds $(SOAK_ROUNDS)

lab: build guest
	@lab/lab up
	@echo "lab/lab exec -- COMMAND runs COMMAND there, lab/lab down powers it off"

# --- the code

fmt: build
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .
	@git ls-files '*.c' '*.h' | xargs clang-format -i

clean:
	rm -rf $(VENV) build *.egg-info kvm_ffi/_kvm*.so kvm_ffi/_kvm.c .cache
