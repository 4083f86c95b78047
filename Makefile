# `make demo` and `make test` do all their own set-up: a fresh machine needs Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean
.DEFAULT_GOAL := demo

# uv installs in half a minute what takes pip minutes; pip does it where uv is not to be had.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medldm needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	if $(BIN)/pip install --quiet uv; \
	  then $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	  else $(BIN)/pip install --quiet --editable '.[dev]'; fi
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/medldm demo $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist
