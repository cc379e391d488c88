# Two commands a new user needs: `make quickstart` and `make test`. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
# Two files of tests at a time: most of them wait for ranks to start.
TEST_WORKERS ?= 2
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: quickstart test lint types tests clean

quickstart: .venv/installed
	python launch/quickstart.py

test: lint types tests

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

types: .venv/installed-dev
	mypy

tests: .venv/installed-dev
	python -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt into .venv (a few minutes the first time)"
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-onnx.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv runs/quickstart
