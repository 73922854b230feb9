# Everything runs in a virtual environment inside the checkout.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test bench asan clean

demo: .venv/installed
	$(BIN)/secateur demo

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/installed
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

asan: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt nanobind
	$(BIN)/python native/sanitize.py

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
