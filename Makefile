# Everything runs in .venv, which is made from requirements.txt and pyproject.toml the first time and when they change.
# uv makes it in seconds; where uv is missing, pip fetches it into a folder of its own. Any installed Python in the range
# of PYTHON does; `make clean` and PYTHON=3.13, or PYTHON=a/path/to/python, choose another one.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON := >=3.11,<3.15
UV := $(shell command -v uv || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

.PHONY: demo demo-text demo-qa quickstart test check fast wheel docs format bench clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: requirements.txt pyproject.toml
	@test -x "$(UV)" || python3 -m venv .uv >/dev/null 2>&1 || { rm -rf .uv; echo >&2 \
		"python3 -m venv: does not work here; install Python 3.11 to 3.14 with venv (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test -x "$(UV)" || .uv/bin/pip install --quiet --disable-pip-version-check uv
	@"$(UV)" python find --system "$(PYTHON)" >/dev/null 2>&1 || { echo >&2 \
		"PYTHON: no installed Python is $(PYTHON); install Python 3.11, 3.12, 3.13 or 3.14, or give PYTHON=a/path/to/python"; exit 1; }
	"$(UV)" venv --quiet --clear --python "$(PYTHON)" $(VENV)
	"$(UV)" pip install --quiet --python $(PY) --requirement requirements.txt
	@touch $@

TRAIN := $(PY) -m torch.distributed.run --standalone --nproc_per_node 2 apps/yolov5/train_prune.py
DEMO := --data runs/data/shapes/data.yaml --hyp apps/yolov5/recipes/hyp.demo.yaml --optimizer AdamW --cos-lr --img 128 \
	--batch-size 8 --patience 0 --device cpu --cache --project runs/demo --exist-ok

demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/.ready  ## train a small YOLOv5 on two processes, prune 80% of it with distillation, print both
	$(PY) data/shapes_detection.py --output runs/data/shapes
	@echo "--- 1 of 2: dense training"
	$(TRAIN) $(DEMO) --cfg yolov5n --epochs 24 --name dense
	@echo "--- 2 of 2: pruning, learning from the dense model as well"
	$(TRAIN) $(DEMO) --weights runs/demo/dense/weights/best.pt --name sparse --do_prune \
		--pruning_config apps/yolov5/recipes/4x1.yaml --dist_loss kl --epochs 14 --cooldown_epochs 6

TEXT := $(PY) apps/text_classification/train_prune.py
QA := $(PY) apps/qa/train_prune.py
SPARSE := --do_prune --dist_loss kl --per_device_train_batch_size 32 --learning_rate 2e-3 --overwrite_output_dir

demo-text: export OMP_NUM_THREADS := 1
demo-text: $(VENV)/.ready  ## a tiny BERT learns film reviews, then loses 80% of its encoder
	@echo "--- 1 of 2: dense training"
	$(TEXT) --output_dir runs/demo/text-dense --overwrite_output_dir
	@echo "--- 2 of 2: pruning, learning from the dense model as well"
	$(TEXT) --output_dir runs/demo/text-sparse --model_name_or_path runs/demo/text-dense $(SPARSE) --num_train_epochs 4

demo-qa: export OMP_NUM_THREADS := 1
demo-qa: $(VENV)/.ready  ## a tiny BERT learns to find answers, then loses 80% of its encoder
	@echo "--- 1 of 2: dense training"
	$(QA) --output_dir runs/demo/qa-dense --overwrite_output_dir
	@echo "--- 2 of 2: pruning, learning from the dense model as well"
	$(QA) --output_dir runs/demo/qa-sparse --model_name_or_path runs/demo/qa-dense $(SPARSE) --num_train_epochs 6

quickstart: $(VENV)/.ready  ## the same idea on one page: train a small classifier, prune it, print what became zero
	$(PY) apps/quickstart/train_prune.py

test: $(VENV)/.ready  ## all tests, the slow ones too
	$(PY) -m pytest -n 2

fast: $(VENV)/.ready  ## without the slow ones
	$(PY) -m pytest -n 2 -m "not slow"

check: $(VENV)/.ready  ## what CI runs: format, lint, types, the wheel, the site, all tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(MAKE) wheel
	$(MAKE) docs
	$(MAKE) test

# The versions of .venv are those that uv has at hand, which makes this a matter of seconds: torch is linked, not fetched.
wheel: $(VENV)/.ready  ## a wheel in .wheel, installed with nothing but what it needs, prunes and slims a model
	rm -rf build .wheel
	"$(UV)" build --quiet --wheel --out-dir .wheel
	"$(UV)" venv --quiet --python $(PY) .wheel/venv
	"$(UV)" pip freeze --quiet --exclude-editable --python $(PY) > .wheel/constraints.txt
	"$(UV)" pip install --quiet --python .wheel/venv/bin/python --constraint .wheel/constraints.txt .wheel/*.whl
	.wheel/venv/bin/python -I tests/support/wheel_smoke.py .wheel/*.whl
	rm -rf build .wheel/venv

docs: $(VENV)/.ready  ## the site, in docs/_build; a warning is an error
	rm -rf docs/_build
	$(PY) -m sphinx -q -W --keep-going -c docs . docs/_build
	@echo "open docs/_build/index.html"

format: $(VENV)/.ready
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/.ready  ## cost of the engine beside AdamW.step
	$(PY) -m benchmarks.engine

clean:
	rm -rf $(VENV) .uv .wheel build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
