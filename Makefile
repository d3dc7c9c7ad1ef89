# make demo    install into .venv what running needs, and let the embedded model tell a story
# make test    install what the tests need as well, and run them
# make lint    ruff and mypy
# make bench   the benchmarks of the INT4 kernels on this machine

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/runs
	@$(BIN)/python -m miniawq.generate

test: .venv/tests
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/tests
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-disable-gc $(ARGS)

.venv/runs: pyproject.toml constraints.txt
	@echo "installing miniawq into .venv" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable .
	@touch $@

.venv/tests: .venv/runs
	@echo "installing what the tests need into .venv" >&2
	@$(PIP) --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
