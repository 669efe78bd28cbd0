# Everything runs in .venv, which is made from requirements.txt the first time and when that file changes.
# uv makes it in seconds; where uv is missing, pip fetches it into a folder of its own.
VENV := .venv
PY := $(VENV)/bin/python
UV := $(shell command -v uv || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

.PHONY: demo test check fast format bench clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: requirements.txt
	@test -x "$(UV)" || { python3 -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv; }
	$(UV) venv --quiet --clear --python 3.11 $(VENV)
	$(UV) pip install --quiet --python $(PY) --requirement requirements.txt
	@touch $@

demo: $(VENV)/.ready  ## train a small network, prune it, print what became zero
	$(PY) apps/quickstart/train_prune.py

test: $(VENV)/.ready  ## all tests, the slow ones too
	$(PY) -m pytest -n 2

fast: $(VENV)/.ready  ## without the slow ones
	$(PY) -m pytest -n 2 -m "not slow"

check: $(VENV)/.ready  ## what CI runs: format, lint, types, all tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(MAKE) test

format: $(VENV)/.ready
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/.ready  ## cost of the engine beside AdamW.step
	$(PY) -m benchmarks.engine

clean:
	rm -rf $(VENV) .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
