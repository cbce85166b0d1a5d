# Each target sets up all it needs: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick mutants bench verify lint format clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) must be Python 3.11 or later: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing what constraints.txt pins into $(VENV) (torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Verifies every kernel that this machine can run, then trains a 1-bit and a bf16 Llama side by side.
# PASSIVE: threads that wait for work sleep. Spinning ones take the cores from the threads that
# have work wherever a machine is shared, and make a step 5 times slower.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(READY)
	$(BIN)/quest verify --quick
	$(BIN)/quest train --recipe bf16 --recipe w1a1 --out runs/demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest property_tests/ -n 2

quick: $(READY)
	$(BIN)/python -m pytest property_tests/ --hypothesis-profile=quick -n 2

# Hours on two cores; goes on where it stopped. ARGUMENTS: see CONTRIBUTING.md.
mutants: $(READY)
	$(BIN)/python -m property_tests.mutants $(ARGUMENTS)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/ --benchmark-compare

verify: $(READY)
	$(BIN)/quest verify

# Only looks; `format` changes files.
lint: $(READY)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info runs .mypy_cache .pytest_cache .ruff_cache
