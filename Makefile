# On a fresh machine: `make demo`, `make test` and, before a merge, `make test-slow`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu lint types install
.DELETE_ON_ERROR:

# The stamp is newer than the files that say what to install, or the install is made again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/kdprof demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# methods/ and reports/ lie beside kdprof/ and are imported as parts of it: mypy finds them there
# through links.
TYPES := $(VENV)/types
types: install
	rm -rf $(TYPES)/kdprof && mkdir -p $(TYPES)/kdprof
	ln -s $(CURDIR)/methods $(CURDIR)/reports $(CURDIR)/kdprof/* $(TYPES)/kdprof/
	MYPYPATH=$(TYPES) $(BIN)/mypy

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=40

test: lint
	$(PYTEST) -m "not slow"

# Processes that are killed, groups of them, a cluster, compilers, the largest networks.
test-slow: install
	$(PYTEST) -m slow

# Checks that need a GPU, in minutes: KDPROF_TEST_DEVICE=cpu runs them on the CPU instead, as a check
# of the checks. Those marked `alone` follow, because other work on the GPU would disturb them.
KDPROF_TEST_DEVICE ?= cuda
WORKERS ?= 8
test-gpu: install
	KDPROF_TEST_DEVICE=$(KDPROF_TEST_DEVICE) $(BIN)/python -m pytest -m "gpu and not alone" \
		-n $(WORKERS) --dist worksteal --durations=15
	KDPROF_TEST_DEVICE=$(KDPROF_TEST_DEVICE) $(BIN)/python -m pytest -m "gpu and alone" \
		-p no:xdist --durations=5
