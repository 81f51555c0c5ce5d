# make install | test | demo | bench-smoke | mutants | test-gpu | lint | clean, each installing into .venv first where that is needed.
# PYTHON names the interpreter that .venv is made with: make install PYTHON=python3.13

PYTHON ?= python3
# Processes that share the tests out, a file at a time.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Nothing that these targets run needs the network, and nothing may wait for it.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Threads that wait for others sleep: while they spin on cores that are shared, everything takes several times as long.
export OMP_WAIT_POLICY := PASSIVE

SMOKE := build/bench-smoke

.PHONY: install test demo bench-smoke mutants test-gpu lint clean

install: $(INSTALLED)

# torch comes first and by its exact version: what pip then meets as a range is satisfied by what is there.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

# The chain of benchmark commands on the CPU with a tiny model: what it writes is no measurement of anything.
bench-smoke: $(INSTALLED)
	rm -rf $(SMOKE)
	$(BIN)/packloop bench run benchmarks/smoke.yaml --output $(SMOKE)/results
	$(BIN)/packloop bench report $(SMOKE)/results --output $(SMOKE)/report
	$(BIN)/packloop bench compare $(SMOKE)/results $(SMOKE)/results
	$(BIN)/packloop plan recipes/demo.yaml --gpu a10g

mutants: $(INSTALLED)
	$(BIN)/python scripts/run_mutants.py

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
