# GNU make 3.81 is enough (macOS ships it). Windows has no make: docs/install.md names the commands.
#   make test PYTHON=python3.12       another Python for the virtual environment
#   make install ACCEL=vulkan         auto, cpu, cuda, metal or vulkan; later runs keep what was installed

PYTHON ?= python3
ACCEL ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(PYTHON) scripts/install.py --venv $(VENV) --accel $(ACCEL)

# The two stamps differ in the extras only. The installer keeps an engine that is there and works, so that going from
# one to the other rebuilds nothing.
RUN := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-for-development
# torch is larger than all the rest, so what is compared with it has an environment of its own, and the CPU's arithmetic.
# The engine's package leaves two files open, which pytest would report there after its last line.
REFERENCE := .venv-parity
COMPARE := $(REFERENCE)/.installed-for-parity
DESKTOP := .venv-desktop
FREEZE := $(DESKTOP)/.installed-for-freezing
# IPython is left out: it is there for the tests, and something frozen would take it along.
FROZEN := build/desktop
# The check of an engine is the installer's too: where it changes, the engine is checked again.
INSTALLER := pyproject.toml $(wildcard scripts/install*.py qwq_lite/selftest/engine_*.py)

.DEFAULT_GOAL := help
.PHONY: help install demo test fast attack golden parity desktop check docs bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s%s\n", $$1, $$2 }' Makefile

install: ## install for this machine's hardware, into .venv
	@rm -f $(RUN) $(DEVELOP)
	$(INSTALL)
	@touch $(RUN)

demo: $(RUN) ## convert a small real model and ask it a question
	$(BIN)/python scripts/demo.py

# Two lanes: tests that start an engine follow each other in one, since two engines at a time are many times slower.
LANES := -n 2 --dist loadgroup

test: $(DEVELOP) ## run the tests, with a sample of those that are exhaustive
	$(BIN)/python -m pytest $(LANES)

fast: $(DEVELOP) ## lint, and the tests that start no engine
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(LANES) --fast

attack: $(DEVELOP) ## run what `make test` leaves out of kills, flipped bytes, types and long laws
	$(BIN)/python -m pytest $(LANES) --attack

golden: $(DEVELOP) ## compare token ids with llama.cpp's golden ones for 15 vocabularies (fetches the engine's source)
	$(BIN)/python -m pytest tests/golden

parity: $(COMPARE) ## compare logits and prompts with transformers (installs torch)
	$(REFERENCE)/bin/python -m pytest -W ignore::ResourceWarning tests/parity

desktop: $(FREEZE) ## freeze the example window with PyInstaller, and try it in a real window
	$(DESKTOP)/bin/pyinstaller --noconfirm --clean --log-level WARN --windowed --name QwQ --paths . --paths examples/desktop \
		--exclude-module IPython \
		--distpath $(FROZEN) --workpath $(FROZEN)/work --specpath $(FROZEN)/work examples/desktop/main.py
	$(DESKTOP)/bin/python -m pytest tests/desktop

check: $(DEVELOP) ## lint, format, types, and whether docs/cli.md is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/docs.py --check

docs: $(DEVELOP) ## write docs/cli.md from the commands' own help
	$(BIN)/python scripts/docs.py

bench: $(RUN) ## run each file of bench/
	@test -n "$(wildcard bench/*.py)" || echo "bench/ holds nothing yet"
	@for file in $(wildcard bench/*.py); do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

clean: ## delete caches and build products; virtual environments stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

$(RUN): $(INSTALLER)
	$(INSTALL)
	@touch $@

$(DEVELOP): $(INSTALLER)
	$(INSTALL) --extras test,check
	@touch $(RUN) $@

$(FREEZE): $(INSTALLER)
	$(PYTHON) scripts/install.py --venv $(DESKTOP) --accel $(ACCEL) --extras test,desktop
	@touch $@

$(COMPARE): $(INSTALLER)
	$(PYTHON) scripts/install.py --venv $(REFERENCE) --accel cpu --extras test,parity
	@touch $@
