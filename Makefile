# Everything runs in .venv, which is made from requirements.txt the first time and when that file changes.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test check fast format bench clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: requirements.txt
	@command -v uv >/dev/null || python3 -m pip install --quiet uv
	uv venv --quiet --clear --python 3.11 $(VENV)
	uv pip install --quiet --python $(PY) --requirement requirements.txt
	@touch $@

demo: $(VENV)/.ready  ## train a small network, prune it, print what became zero
	$(PY) apps/quickstart/train_prune.py

test: $(VENV)/.ready  ## all tests, the slow ones too
	$(PY) -m pytest -n 2

fast: $(VENV)/.ready  ## the tests that take no time
	$(PY) -m pytest -n 2 -m "not slow"

check: $(VENV)/.ready  ## what CI runs: format, lint, types, tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -n 2

format: $(VENV)/.ready
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/.ready  ## cost of the engine beside AdamW.step
	$(PY) -m benchmarks.engine

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
