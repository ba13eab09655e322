# make demo: quantize a small network, from training to a verified ONNX file, in a few minutes, without any download of data
# make test: run the tests, one process a core
# Both create .venv on first use. PYTHON: an interpreter of at least 3.11.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/ptq demo demo

test: .venv/test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv demo
