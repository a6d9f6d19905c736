# `make quickstart` and `make test` do all set-up by themselves, and do nothing twice.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test clean

help:
	@echo "make quickstart   make .venv, install, then build, train, evaluate a small LLaVA on real digits (CPU, minutes)"
	@echo "make test         the same .venv plus the test tools; lint, then the test suite"
	@echo "make clean        remove .venv and the quickstart's output"

.venv/installed: requirements.txt pyproject.toml
	@echo "==> making .venv and installing requirements.txt (several minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	@touch $@

.venv/installed-test: .venv/installed
	@echo "==> installing the test tools into .venv, torchvision beside it"
	$(BIN)/pip install --quiet --requirement requirements.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
	@touch $@

quickstart: .venv/installed
	$(BIN)/python recipes/quickstart.py --output_dir quickstart_output

test: .venv/installed-test
	@echo "==> lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "==> tests, a file at a time on each core"
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile
	@echo "==> LLaVA-OneVision's tests, with torchvision; the others ran as a machine without it does"
	PYTHONPATH=.venv/torchvision:tests/torchvision_on_cpu $(BIN)/python -m pytest --numprocesses auto -k onevision

clean:
	rm -rf .venv quickstart_output
