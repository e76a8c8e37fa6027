# `make demo` and `make test` need nothing but Python 3.11 or later: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
QUANTISATION := .venv/quantisation

# Two processes run the tests: with two threads each they would wait for one another.
test matrix: export OMP_NUM_THREADS := 1

.PHONY: demo test matrix bench bench-gpu lint wheel docs clean

demo: $(STAMP)  ## the main job on the real architectures; DEMO="--quick" for two minutes
	$(BIN)/toma-fx demo $(DEMO)

test: $(QUANTISATION) lint wheel docs  ## lint, types, tests, and the wheel tested outside the tree
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not matrix_full" $(PYTEST)

matrix: $(QUANTISATION)  ## all that users of diffusers do, in every mode; writes docs/matrix.md and its summary in docs/limits.md
	$(BIN)/python -m pytest tests/matrix -n 2 --matrix-table docs/matrix.md $(PYTEST)

bench: $(STAMP)  ## the tables of speed in docs/speed.md, in ten minutes on two cores; BENCH="..." for more options
	$(BIN)/python -m benchmarks.presets readme --out benchmarks/results $(BENCH)

bench-gpu: $(STAMP)  ## what is measured on a GPU; no part starts after eight minutes
	$(BIN)/python -m benchmarks.presets h200 --out benchmarks/results $(BENCH)

lint: $(STAMP)
	$(BIN)/ruff check toma_fx/ toma_fx/passes/ toma_fx/runtime/ tests examples benchmarks
	$(BIN)/ruff format --check toma_fx/ toma_fx/passes/ toma_fx/runtime/ tests examples benchmarks
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python tests/check_wheel.py

docs: $(STAMP)  ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable . --group dev
	touch $@

$(QUANTISATION): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group quantisation
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
