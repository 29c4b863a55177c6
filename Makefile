# Every target first makes the environment that it needs: .venv, with the versions of constraints.txt, for most.
PYTHON ?= python3
ARCH   ?= 90
VENV   ?= .venv
BIN    := $(VENV)/bin
# One process per core. A process that has nothing left to do takes tests from another one.
PARALLEL := -n auto --dist worksteal
NEED_TRANSFORMERS := tests/hf tests/deferred/test_operations.py tests/losses/test_causal_lm.py tests/project/test_examples.py \
	tests/trl/test_patch_model.py
# Material for MkDocs prints a notice about MkDocs 2 otherwise.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test test-compiled test-architectures test-quick test-transformers-4 test-oldest test-newest test-kernels-hub test-other-libraries test-trainers test-deepspeed check format bench readme-figures traffic proofs comparison sweep docs gpu kernels-hub release clean

demo: $(VENV)/.ready
	$(BIN)/python -m fused_ignore_ce demo

test: $(VENV)/.ready
	$(BIN)/pytest $(PARALLEL)

# One case of every test on every backend, without slow tests; see tests/helpers/quick.py.
test-quick: $(VENV)/.ready
	$(BIN)/pytest $(PARALLEL) --quick

# The tests of kernels, on what Triton compiles for sm_$(ARCH), executed on the CPU; see bench/proofs/emulator.
test-compiled: $(VENV)/.ready
	TEST_COMPILED=$(ARCH) $(BIN)/pytest $(PARALLEL) -k 'triton or on_chip' tests/kernels tests/core tests/logits tests/losses tests/linear \
		tests/distributed tests/trl

# PyTorch's samples, hazards and random cases on what Triton compiles for every architecture, a line of result for each;
# ONLY="--arch 75" chooses.
test-architectures: $(VENV)/.ready
	$(BIN)/python -m tests.architectures $(ONLY)

# The tests that need transformers, on its last release before 5.
test-transformers-4: $(VENV)-transformers-4/.ready
	$(VENV)-transformers-4/bin/pytest $(PARALLEL) $(NEED_TRANSFORMERS)

# The whole suite on the oldest versions that pyproject.toml allows, with PYTHON=python3.12; downloads 3 GB.
test-oldest: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/pytest $(PARALLEL)

# The whole suite on the newest releases that it ran with; downloads 3 GB.
test-newest: $(VENV)-newest/.ready
	$(VENV)-newest/bin/pytest $(PARALLEL)

# Checks that Hugging Face's kernels loads what `make kernels-hub` writes.
test-kernels-hub: $(VENV)-kernels-hub/.ready
	$(VENV)-kernels-hub/bin/python -m pytest tests/project/test_kernels_hub.py

# `defer_logits` on the models of LitGPT and torchtitan.
test-other-libraries: $(VENV)-other-libraries/.ready
	$(VENV)-other-libraries/bin/python -m pytest tests/other_libraries

# The guides to trainers of others, with their packages; downloads 200 MB.
test-trainers: $(VENV)-trainers/.ready
	$(VENV)-trainers/bin/python -m pytest tests/trainers

# Patched models under DeepSpeed, on two processes. It compiles an extension at run time, with ninja.
test-deepspeed: $(VENV)-deepspeed/.ready
	CC=gcc PATH="$(abspath $(VENV)-deepspeed/bin):$$PATH" $(VENV)-deepspeed/bin/python -m pytest tests/deepspeed

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine with a GPU: tests, sanitizer, tuner, measurements and host times.
gpu: $(VENV)/.ready
	$(BIN)/python -m bench.gpu

# Writes build/kernels-hub, the package as Hugging Face's kernels loads it.
kernels-hub: $(VENV)/.ready
	$(BIN)/python -m scripts.kernels_hub

# Says what keeps this commit from being released, or else builds dist/ and checks it.
release: $(VENV)/.ready
	$(BIN)/python -m scripts.release $(if $(TAG),--tag $(TAG))

# Measures everything side by side on this machine, in nine minutes; writes bench/results.
bench: $(VENV)/.ready
	$(BIN)/python -m bench.run

# Asks this package and its peers what they can do; writes bench/results. TORCH names interpreters with other releases of
# PyTorch, whose linear loss is asked as well.
comparison: $(VENV)-comparison/.ready
	$(VENV)-comparison/bin/python -m bench.comparison $(foreach python,$(TORCH),--torch $(python))

# Writes the tables and pictures of README and docs, from the newest of bench/results.
readme-figures: $(VENV)/.ready
	$(BIN)/python -m bench.figures

# Executes compiled kernels, and counts the bytes that they read and write.
traffic: $(VENV)/.ready
	$(BIN)/python -m bench.proofs.traffic

# Compiles the kernels without a GPU, and counts their instructions.
proofs: $(VENV)/.ready
	$(BIN)/python -m bench.proofs

# Compares every class of transformers' auto-mappings with its patched self; writes docs/transformers-coverage.md.
sweep: $(VENV)/.ready
	$(BIN)/python -m tests.transformers_coverage --out docs/transformers-coverage.md

# Builds the site into site/ without a warning, then serves it if somebody is there to read it.
docs: $(VENV)/.ready
	$(MKDOCS) build --strict
	@if [ -t 1 ]; then $(MKDOCS) serve --strict; fi

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 $(VENV)-oldest $(VENV)-newest $(VENV)-kernels-hub $(VENV)-other-libraries $(VENV)-trainers $(VENV)-deepspeed $(VENV)-comparison build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# An environment beside the first one, which finds there all packages that it does not have itself.
define beside
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/first-environment.pth
endef

# constraints-NAME.txt takes the place of lines of constraints.txt.
define merged
	packages=$$(sed -nE 's/^([A-Za-z0-9_-]+)==.*/\1/p' constraints-$(1).txt | paste -sd '|'); \
	grep -vE "^($$packages)==" constraints.txt | cat - constraints-$(1).txt > $(@D)/constraints.txt
endef

# transformers behaves differently where Hugging Face's kernels is installed.
$(VENV)-kernels-hub/.ready: $(VENV)/.ready
	$(beside)
	$(@D)/bin/python -m pip install -c constraints.txt kernels
	touch $@

# LitGPT and torchtitan ask for older versions of packages that their models do not import.
$(VENV)-other-libraries/.ready: $(VENV)/.ready
	$(beside)
	$(@D)/bin/python -m pip install -c constraints.txt einops lightning spmd_types torch_checkpointing torchdata tyro
	$(@D)/bin/python -m pip install -c constraints.txt --no-deps bitsandbytes litgpt torchao torchtitan
	touch $@

# These ask for CUDA's packages, and for older versions of PyTorch and transformers.
$(VENV)-trainers/.ready: $(VENV)/.ready constraints-trainers.txt
	$(beside)
	$(call merged,trainers)
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt absl-py cachetools cloudpickle einops grpcio lightning msgpack omegaconf \
		protobuf pylatexenc pyvers sentencepiece spmd_types tiktoken torch_checkpointing torchdata tyro
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt --no-deps litgpt megatron-core openrlhf ray tensorboard tensordict torchao \
		torchtitan torchtune verl
	touch $@

$(VENV)-deepspeed/.ready: $(VENV)/.ready
	$(beside)
	CC=gcc $(@D)/bin/python -m pip install -c constraints.txt deepspeed
	touch $@

# CCE's releases are older than its repository, and ask for other versions of packages.
CCE ?= git+https://github.com/apple/ml-cross-entropy.git@d42911f9b1a1f98289bb601c35c8151562603d74
$(VENV)-comparison/.ready: $(VENV)/.ready
	$(beside)
	$(@D)/bin/python -m pip install --no-deps '$(CCE)'
	touch $@

$(VENV)-%/.ready: pyproject.toml constraints.txt constraints-%.txt
	$(PYTHON) -m venv $(@D)
	$(call merged,$*)
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt -e '.[dev]'
	touch $@
