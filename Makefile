# Every verb makes its own environment first: .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-transformers-4 check format bench readme-figures traffic proofs sweep clean

demo: $(VENV)/.ready
	$(BIN)/python -m fused_ignore_ce demo

test: $(VENV)/.ready
	$(BIN)/pytest -n auto --dist loadfile

# What touches transformers, on the last release before 5.
test-transformers-4: $(VENV)-transformers-4/.ready
	$(VENV)-transformers-4/bin/pytest -n auto --dist loadfile tests/test_hf*.py tests/test_causal_lm.py tests/test_deferred.py tests/test_transformers_coverage.py

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Measures everything side by side on this machine, in nine minutes; writes bench/results.
bench: $(VENV)/.ready
	$(BIN)/python -m bench.run

# The README's tables and plots, from the newest of bench/results.
readme-figures: $(VENV)/.ready
	$(BIN)/python -m bench.figures

traffic: $(VENV)/.ready
	$(BIN)/python -m bench.proofs.traffic

# Compiles every kernel for GPUs that are not here, and counts its instructions.
proofs: $(VENV)/.ready
	$(BIN)/python -m bench.proofs

# Compares every class of transformers' auto-mappings with its patched self; writes docs/transformers-coverage.md.
sweep: $(VENV)/.ready
	$(BIN)/python -m tests.transformers_coverage --out docs/transformers-coverage.md

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-transformers-4/.ready: pyproject.toml constraints.txt constraints-transformers-4.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|datasets)==' constraints.txt | cat - constraints-transformers-4.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt -e '.[dev]'
	touch $@
