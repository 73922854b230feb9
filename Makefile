# Everything runs in a virtual environment inside the checkout.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-fast lint format docs native asan hostile bench zoo clean

demo: .venv/installed
	$(BIN)/secateur demo

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# What to run while working: one file of laws for most rooms, without slow tests. `make test` runs everything.
FAST = allocation batches dispatch docs folding formats gather group guards importance inspect io layers methods native_source packed \
       pattern recipe routes schedules sparsify stages statistics text timing
test-fast: .venv/installed
	$(BIN)/pytest -m "not slow" $(FAST:%=tests/test_%.py)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Another version of clang-format gives another format, so that only the one of .clang-format is used.
CLANG_FORMAT ?= $(firstword $(wildcard $(BIN)/clang-format) clang-format)
CLANG_FORMAT_VERSION = $(shell sed -n 's/.*for clang-format \([0-9]*\).*/\1/p' .clang-format)
format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@if $(CLANG_FORMAT) --version 2>/dev/null | grep -q "version $(CLANG_FORMAT_VERSION)\."; \
	then $(CLANG_FORMAT) -i $(wildcard native/*.h native/*.cpp native/*/*.h native/*/*.cpp); \
	else echo "clang-format $(CLANG_FORMAT_VERSION) was not found: native/ is left as it is"; fi

docs: .venv/installed
	$(BIN)/pytest tests/test_docs.py

# Compiles what changed in native/, and puts the module where the installed one is. Then nothing is to be reinstalled.
# OPENVINO=ON: also the library for the OpenVINO that is installed.
OPENVINO ?= OFF
native: $(if $(wildcard .venv/installed),,.venv/installed)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt nanobind
	cmake -S . -B build/native -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DSECATEUR_OPENVINO=$(OPENVINO)
	cmake --build build/native --parallel
	cmake --install build/native --prefix $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
	touch .venv/installed

bench: .venv/installed
	for script in $(filter-out benchmarks/accidents.py benchmarks/hostile_files.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# The tables of docs/models.md. The libraries whose models it tries have an environment of their own, and are not in CI.
zoo: .zoo/installed
	.zoo/bin/python benchmarks/zoo --output docs/models.md

.zoo/installed: .venv/installed
	$(PYTHON) -m venv .zoo
	.zoo/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . transformers \
	    torchvision==0.28.0 timm==1.0.31 diffusers==0.42.1
	touch $@

asan: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt nanobind
	$(BIN)/python native/sanitize.py

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Files that were changed at random, read by the kernels of `make asan`.
MINUTES ?= 5
hostile: .venv/installed
	$(BIN)/python benchmarks/hostile_files.py --sanitize --minutes $(MINUTES)

clean:
	rm -rf .venv .zoo
