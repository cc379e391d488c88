# Two commands a new user needs: `make quickstart` and `make test`. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
# Files of tests at a time; those of ranks spend much of their time waiting (three were 17 % faster than two on two cores).
TEST_WORKERS ?= 3
PYTEST = OMP_NUM_THREADS=1 python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# They start processes of their own; some take minutes, and so they begin first.
RANK_TESTS = tests/end_to_end tests/distributed tests/cluster tests/gpu tests/fake_cuda
# Not compiled: of the 300 MB of Python that come, each module that is used is compiled when it is first imported.
# PEP 517: pip up to 23.0, of Python 3.10's and 3.11's first releases, cannot build seqeval in its own way.
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --use-pep517
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Where it is set, every process would compile those modules anew: 15 s for a rank, in place of 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint types tests unit-tests rank-tests docs clean

quickstart: .venv/installed
	python launch/quickstart.py

# Every one of them runs, also after one has failed.
test: .venv/installed-dev
	$(MAKE) --no-print-directory --keep-going lint types tests

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

types: .venv/installed-dev
	mypy

tests: .venv/installed-dev
	$(PYTEST) $(RANK_TESTS) tests/unit

unit-tests: .venv/installed-dev
	$(PYTEST) tests/unit

rank-tests: .venv/installed-dev
	$(PYTEST) $(RANK_TESTS)

# The pages of docs/ as a site: open site/index.html; its search wants a server, python -m http.server -d site.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt into .venv (a few minutes the first time)"
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-onnx.txt requirements-remote.txt requirements-sources.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv/installed-docs: requirements-docs.txt | .venv/bin/python
	$(PIP) -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv runs/quickstart site
