# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow selftest check bench bench-parity parity-scale reports train clean

# Creates .venv with the pinned dependencies; again whenever the pins change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q porter parity runtime conversions  # pip does not, for an editable install
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/porter demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

selftest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parity/test_selftest.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy porter parity conversions/*/recipe.py conversions/common/*/recipe.py
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.bench

# What a trace costs beside the plain forward, at FLUX.1's width.
bench-parity: $(STAMP)
	$(BIN)/python -m tests.bench_parity

# FLUX.1-dev at full size, 11.9 billion parameters, in 8 GiB: against the original code where PORTER_REFERENCES has it.
parity-scale: $(STAMP)
	$(BIN)/python -m parity.scale conversions/flux1/scale.py:$(if $(PORTER_REFERENCES),ORIGINAL_NATIVE,DIFFUSERS_NATIVE) -o build/parity-scale

reports: $(STAMP)
	rm -rf build/reports && mkdir -p build/reports
	$(BIN)/porter convert builtin:tiny-flux -o build/reports/tiny-flux
	$(BIN)/porter parity build/reports/tiny-flux
	mkdir -p reports/flux1
	cp build/reports/tiny-flux/parity/parity.json build/reports/tiny-flux/parity/report.html reports/flux1/
	$(BIN)/porter demo -o build/reports/demo
	cp build/reports/demo/contact-sheet.png build/reports/demo/good-and-broken.png docs/
	$(BIN)/python -m conversions.publish reports
	$(BIN)/python -m parity.scoreboard reports

train: $(STAMP)
	$(BIN)/python -m porter.builtin.training

clean:
	rm -rf $(VENV) build dist *.egg-info porter-demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
