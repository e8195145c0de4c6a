# `make serve` and `make test` are all that a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test soak install browser prometheus dashboards pictures lock chart test-long test-gpu test-kubernetes clean

VENV ?= .venv
PORT ?= 8000
MODEL ?=
ARGS ?=
PRESET ?= short
SMALL_MODEL := .models/llama

# The first of these that runs, is in range, and can make a virtual environment (Debian packages that part by itself).
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	"$$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo "$$python" && break; done)

# What is installed: the build that fits the machine, keyed by the files that say what it consists of.
BUILD := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP := $(VENV)/.$(BUILD)-$(shell cat requirements/$(BUILD).txt requirements/dev.txt pyproject.toml | sha256sum | cut -c1-16)
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
TORCH := $(shell grep -o '^torch==[^ ]*' requirements/cpu.txt)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  Settings: MODEL=<path or hub id> PORT=<8000> ARGS='<more options of tknp serve>' PYTHON=<python3.11>"

serve: install $(if $(MODEL),,$(SMALL_MODEL)/model.safetensors) ## Install, make a small model, serve it on PORT (MODEL= for a real one)
	@exec $(VENV)/bin/tknp serve $(or $(MODEL),$(SMALL_MODEL)) --port $(PORT) $(ARGS)

test: install browser prometheus ## Everything that CI runs; stops at the first stage that fails
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pytest

soak: install ## Mixed traffic, hang-ups and engine faults on the real stack (PRESET=short, thousand or hour)
	$(VENV)/bin/python -m tests.soak $(PRESET) --log-dir logs/soak --output logs/soak/summary.json

test-long: install ## Three minutes that CI has no room for: two engines of each kind, which change their roles, and more of them
	TKNP_TEST_LONG=1 $(VENV)/bin/pytest tests/e2e/test_shapes.py -k 'several_engines or one_by_two'

test-gpu: install ## Greedy tokens on this machine's GPUs against plain vLLM's: a minute a case, for as many GPUs as there are
	$(VENV)/bin/python -m tests.gpu --log-dir logs/gpu

test-kubernetes: install ## Discovery and the chart against a real Kubernetes API server, built first: 6 to 30 minutes, once
	scripts/kube_apiserver.sh
	TKNP_TEST_KUBERNETES=1 $(VENV)/bin/pytest tests/kubernetes

install: $(STAMP) ## Make the virtual environment and install into it; does nothing when it is up to date

browser: ## Fetch the browser that the live page is tested in, where npm can
	@scripts/browser.sh || echo "The browser could not be fetched; its test uses one of this machine's, or is skipped" >&2

prometheus: ## Fetch the Prometheus that rules and dashboards are tested with, where apt can
	@scripts/prometheus.sh || echo "Prometheus could not be fetched; its tests use one of this machine's, or are skipped" >&2

dashboards: install ## Write deploy/helm/tknp/dashboards/*.json from deploy/grafana/
	$(VENV)/bin/python -m deploy.grafana

pictures: install browser prometheus ## Draw the dashboards of a running system into docs/images
	$(VENV)/bin/python -m tests.e2e.pictures

lock: ## Resolve requirements/*.in again (UPGRADE=1 moves every pin)
	PYTHON=$(PYTHON) scripts/lock.sh

chart: install ## Write again what follows from the Helm chart: golden manifests, the router's options in its schema
	$(VENV)/bin/python -m tests.deploy.renew

clean: ## Remove the virtual environment, the small model, logs and caches
	rm -rf $(VENV) .browser .prometheus .models logs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(SMALL_MODEL)/model.safetensors: | install
	@$(VENV)/bin/tknp make-model $(SMALL_MODEL)

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "tknp needs Python 3.11 or 3.12 with its venv module (Debian: apt install python3 python3-venv)" >&2; exit 1; fi
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): | $(VENV)/bin/python
	@echo "Installing the $(BUILD) build into $(VENV): a few minutes the first time"
	@$(MAKE) --no-print-directory install-$(BUILD)
	@rm -f $(VENV)/.cpu-* $(VENV)/.cuda-*
	@touch $@

# The CPU lock is complete, so pip resolves nothing and can't pull in a CUDA package. The CPU build of torch may be on an
# index or a folder that pip is set up with; if not, it comes from PyTorch's own index.
.PHONY: install-cpu install-cuda
install-cpu:
	@echo "1/3 $(TORCH)"
	@$(PIP) --no-deps $(TORCH) 2>/dev/null \
		|| $(PIP) --no-deps --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@echo "2/3 vLLM and $$(grep -c == requirements/cpu.txt) pinned packages"
	@$(PIP) --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	@echo "3/3 tknp itself"
	@$(PIP) --no-deps --no-build-isolation --editable .

install-cuda:
	@echo "1/2 vLLM for CUDA; pip resolves its dependencies"
	@$(PIP) -r requirements/cuda.txt -r requirements/dev.txt
	@echo "2/2 tknp itself"
	@$(PIP) --editable .
