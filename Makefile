# The two commands of README.md, and what else a developer runs. Everything goes through .venv, made when absent.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
TORCH := torch==2.13.0

# Rewritten tests and compiled modules are kept in __pycache__: the tests start many processes that import the same.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest slow bench bench-all lint graphs docs clean

# torch goes in first and alone, by exact version: nothing later may pull in another build of it.
$(VENV)/installed: pyproject.toml requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/bench-installed: $(VENV)/installed requirements-bench.txt
	$(PIP) -r requirements-bench.txt
	touch $@

demo: $(VENV)/installed
	$(PY) -m recfx.examples.deepfm --batch_size 1000 --gradient_accumulation_steps 1 --thread_num 2 --prefetch 0 \
	    --log_steps 50 --save_steps 1000 --output_dir demo/ckpt --overwrite --generated_dir demo/data

# Linters and type checker run next to the tests. Three processes on two cores: some tests wait for a disk or a clock.
# Files are taken in the order of tests/conftest.py, the longest first.
test: $(VENV)/installed
	$(MAKE) --jobs=2 --no-print-directory lint pytest

pytest: $(VENV)/installed
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The Triton of a device's torch, for the tests that compile with both; it is not installed.
$(VENV)/triton-3.6/installed: $(VENV)/installed
	$(PIP) --no-deps --upgrade --target $(@D) triton==3.6.0
	touch $@

slow: $(VENV)/installed $(VENV)/triton-3.6/installed
	$(PY) -m pytest -m slow

BENCH := $(PY) -m pytest --benchmark-only -p no:cacheprovider -o addopts= -s

# The step, alone and on a busy host, and the program, beside their peers. bench-all: also features, readers, checkpoints and growth.
bench: $(VENV)/bench-installed
	$(BENCH) bench/test_step.py bench/test_busy.py bench/test_end_to_end.py

bench-all: $(VENV)/bench-installed
	$(BENCH) bench

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Accepts the captured graphs as they are now; review the diff of graphs/.
graphs: $(VENV)/installed
	$(PY) -m pytest tests/capture/test_graphs.py tests/capture/test_cuda_code.py --accept-graphs

$(VENV)/docs-installed: $(VENV)/installed requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

# docs/ as a site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

clean:
	rm -rf $(VENV) demo site ckpt ckpt-deepctr .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks *.egg-info
