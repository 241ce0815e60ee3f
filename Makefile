# Everything runs in $(VENV), which the first target that needs it builds from constraints.txt.
# Delete the folder (`make clean`) to start afresh.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

ARGS ?=
JOBS ?= auto

# Their requirements name other versions of torch, or parts that narrows does not use.
NO_DEPS := torchvision timm

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format unit machines docs bench-setup clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  the interpreter that builds the environment (3.11 or newer)"
	@echo "  VENV=$(VENV)  where the environment is"
	@echo "  ARGS=...  more arguments for demo, unit and machines, such as ARGS='-k capture'"
	@echo "  JOBS=$(JOBS)  how many processes share the tests; 0: none but pytest's own"

demo: $(BIN)/.installed  ## set up, then train, prune and export a digits network
	$(BIN)/narrows demo $(ARGS)

test: check unit  ## set up, then ruff, pyright and pytest

check: $(BIN)/.installed  ## ruff and pyright only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(BIN)/.installed  ## pytest only
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

machines: $(BIN)/.installed  ## the tests under the conditions of other processors; takes hours
	$(BIN)/python -m benchmarks.machines $(ARGS)

format: $(BIN)/.installed  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/.installed  ## write docs/ops.md from the op table
	$(BIN)/narrows ops --markdown > docs/ops.md

setup: $(BIN)/.installed  ## build the environment and nothing else

bench-setup: $(BIN)/.installed  ## add the packages that benchmarks/ compares with
	$(PIP) install --quiet --constraint constraints.txt -e '.[bench]' --no-build-isolation
	$(PIP) install --quiet --constraint constraints.txt --no-deps apple-upscale

clean:  ## remove the environment and the demo's output
	rm -rf .venv demo-out build *.egg-info

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "narrows needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --constraint constraints.txt --upgrade setuptools
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation -e '.[tvm,demo,test]'
	@$(PIP) install --quiet --constraint constraints.txt --no-deps $(NO_DEPS)
	@touch $@
