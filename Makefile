# make demo      install into .venv what running needs, and let the embedded model tell a story
# make test      install what the tests need as well, and run those that compile little: under 3 minutes
# make test-all  run all tests, those that compile much too
# make lint      ruff and mypy
# make bench     the benchmarks of the INT4 product on this machine
# make fuzz      read changed files for MINUTES=10, and count what comes (Linux)
# make faults    disturb runs of quantize and convert for MINUTES=10, and count what is lost (Linux)

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
MINUTES ?= 10
# One thread for each of two processes: two cores are what CI has. Tests start many processes: byte code is kept for them.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all lint bench fuzz faults clean

demo: .venv/runs
	@$(BIN)/python -m miniawq.generate

test: .venv/tests
	$(PYTEST) -m "not compiles and not thorough" $(ARGS)

test-all: .venv/tests
	$(PYTEST) $(ARGS)

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/tests
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-disable-gc $(ARGS)

fuzz: .venv/fuzzes
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --minutes $(MINUTES) $(ARGS)

faults: .venv/tests
	OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py --minutes $(MINUTES) $(ARGS)

.venv/runs: pyproject.toml constraints.txt
	@test ! -t 2 || echo "installing miniawq into .venv" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable .
	@touch $@

.venv/tests: .venv/runs
	@test ! -t 2 || echo "installing what the tests need into .venv" >&2
	@$(PIP) --editable ".[test]"
	@touch $@

.venv/fuzzes: .venv/tests
	@$(PIP) --editable ".[fuzz]"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
