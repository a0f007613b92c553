# Everything happens in .venv. PYTHON may name another interpreter (3.11 or newer).
# TORCH_ARGS are extra pip arguments for torch, e.g. an index of builds for your CUDA version; the default takes
# whatever build of this version your package index serves.
PYTHON ?= python3
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One command line for tests, here and in CI.
# Three workers, as most of the time goes into waiting for services and Airflow. A file stays with one
# worker; tests/conftest.py says which come first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test check docs bench bench-gpu lock clean

install: $(STAMP)

$(STAMP): pyproject.toml engine/pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25" "uv>=0.8,<1"
	@# pip first: it finds a locally provided build of torch where the installer below would not look.
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "torch==$$(sed -n 's/^torch==//p' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e . -e engine
	@touch $@

demo: install
	$(BIN)/python demo/run.py

test: install
	$(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site in build/docs; a link that leads nowhere is an error.
docs: install
	$(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python benchmarks/throughput.py

# On a machine with a GPU, which may have no network: with what is installed there, and nothing that is not needed.
# BENCH_GPU_ARGS are its arguments, e.g. "--stages equal probe --out FOLDER".
bench-gpu:
	PYTHONPATH=engine:. $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(BENCH_GPU_ARGS)

clean:
	rm -rf $(VENV) demo/run build *.egg-info engine/*.egg-info

# Resolves requirements.lock anew. With a CPU build of torch at hand (UV_FIND_LINKS names its folder) the lock has no
# CUDA packages; a CUDA build of torch brings its own when it is installed.
lock:
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --extra s3 --extra iceberg --group dev \
		pyproject.toml engine/pyproject.toml | sed 's/+cpu$$//' > requirements.lock
