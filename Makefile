# Each target sets up all it needs: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick bench lint clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Verifies every kernel that this machine can run, then trains a 1-bit and a bf16 Llama side by side.
demo: $(READY)
	$(BIN)/quest verify
	$(BIN)/quest train --recipe bf16 --recipe w1a1 --out runs/demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest property_tests/

quick: $(READY)
	$(BIN)/python -m pytest property_tests/ --hypothesis-profile=quick

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/ --benchmark-compare

lint: $(READY)
	$(BIN)/pre-commit run --all-files

clean:
	rm -rf $(VENV) build dist *.egg-info runs
