# make demo   build and check the bundled demo checkpoint        make test   the tests
# make check  everything that guards a change                    make oracles  side environments of other tools
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out/demo

.PHONY: setup demo test check lint types layers style oracles test-oracles fuzz torture bench map clean
setup: $(READY)
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/qquant build --recipe demo --out $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

check: lint types layers test
lint: $(READY)
	$(BIN)/ruff check qquant tests
	$(BIN)/ruff format --check qquant tests
types: $(READY)
	$(BIN)/mypy
layers: $(READY)
	$(BIN)/lint-imports
style: $(READY)
	$(BIN)/ruff check --fix qquant tests
	$(BIN)/ruff format qquant tests

oracles: $(READY)
	tests/oracles/make.sh
test-oracles: oracles
	$(BIN)/pytest -q -m oracle

# Coverage-guided fuzzing of the readers of strange files, a million inputs, in an environment of its own; then mutations by structure.
FUZZ := .venv-fuzz
RUNS ?= 350000
fuzz: $(READY)
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install -q --disable-pip-version-check atheris numpy safetensors gguf pydantic ruamel.yaml
	for reader in safetensors gguf json; do \
	  PYTHONPATH=. $(FUZZ)/bin/python tests/fuzz/readers.py $$reader $(RUNS) out/fuzz || exit 1; done
	$(BIN)/python -m tests.fuzz.strangers $(RUNS)

# Builds that are killed a thousand times, whose every call fails once, whose disk is full, and that come eight at once; then the commands
# that judge, publish, sign, patch and verify what they made.
KILLS ?= 1000
torture: $(READY)
	$(BIN)/python -m tests.torture kill $(KILLS)
	$(BIN)/python -m tests.torture calls
	$(BIN)/python -m tests.torture full
	$(BIN)/python -m tests.torture crowd
	$(BIN)/python -m tests.torture_ranks 60
	$(BIN)/python -m tests.torture_release 100

# The tables of pages that are made from the code: rooms in qquant/README.md, fields of recipes in recipes/README.md.
map: $(READY)
	$(BIN)/python -m tests.worlds.house
clean:
	rm -rf $(VENV) $(FUZZ) out .pytest_cache .mypy_cache .ruff_cache
