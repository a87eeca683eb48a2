# From a fresh clone, with Python 3.10 or later, git and make:
#
#     make test     lint, types, all tests with branch coverage, and what a release would hold
#     make demo     a sign-up page and its mail server, in your browser
#     make bench    what things cost, beside other packages
#
# PYTHON=python3.13 chooses another Python.  Each command keeps a virtual environment of its own in this folder, and
# installs again only if what it depends on has changed.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

TEST := .venv-test
DEMO := .venv-demo
PEERS := .venv-peers
SOURCES := Makefile pyproject.toml requirements-test.txt setup.cfg setup.py

.PHONY: test demo bench dist format clean check-python strace
.DELETE_ON_ERROR:

test: $(TEST)/installed-$(VERSION) strace
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest --cov=pyramid_mailqueue

demo: $(DEMO)/installed-$(VERSION)
	@exec $(DEMO)/bin/python -m demo

bench: $(TEST)/installed-$(VERSION) $(PEERS)/installed-$(VERSION)
	$(TEST)/bin/python -m benchmarks.request_time $(PEERS)/bin/python

# What is uploaded for a release.
dist: $(TEST)/installed-$(VERSION)
	rm -rf dist
	$(TEST)/bin/python -m build
	$(TEST)/bin/twine check --strict dist/*

format: $(TEST)/installed-$(VERSION)
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

clean:
	rm -rf $(TEST) $(DEMO) $(PEERS) build dist *.egg-info demo/*.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# "|": checked before an installation, but no reason for one.
$(TEST)/installed-$(VERSION): $(SOURCES) | check-python
	$(PYTHON) -m venv --clear $(TEST)
	$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-test.txt --editable '.[testing]'
	@touch $@

$(DEMO)/installed-$(VERSION): $(SOURCES) demo/pyproject.toml | check-python
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' --editable ./demo
	@touch $@

$(PEERS)/installed-$(VERSION): Makefile benchmarks/peers.txt | check-python
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers.txt --editable .
	@touch $@

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo >&2 'There is no "$(PYTHON)" here.  Name a Python of 3.10 or later: make test PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo >&2 '"$(PYTHON)" is Python $(VERSION), but 3.10 or later is needed.  Name another one: make test PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo >&2 '"$(PYTHON)" has no module "venv".  On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }

# Some tests watch the system calls of a commit.  Without strace they are left out, and the end of the run says so.
strace:
	@if ! command -v strace >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq update && apt-get -qq install --yes --no-install-recommends strace >/dev/null \
	    || echo >&2 'strace could not be installed: the tests that need it will be left out.'; \
	fi
