# Everything a newcomer needs; each target sets up .venv by itself.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named by content: nbdev-export touches pyproject.toml without changing it.
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
SITE ?= _site
# baselines adds PPMd to the report; export adds transformers, against which the peer tests compare.
EXTRAS ?= dev,docs,baselines

# make study ARXIV=DIR SCALE=desk WORKSPACE=DIR ARGS="--only R01,R02"
STUDY = $(if $(ARXIV),--arxiv "$(ARXIV)") $(if $(SCALE),--scale "$(SCALE)") $(if $(WORKSPACE),--workspace "$(WORKSPACE)") $(ARGS)

.PHONY: help install study test test-slow test-pages docs lab hooks clean clean-notebooks

help:
	@echo "make study   arXiv sources in, a finished study out (ARXIV=DIR SCALE=smoke|desk WORKSPACE=DIR ARGS=...)"
	@echo "make test    nbdev-test and pytest"
	@echo "make test-slow   the campaigns: kills, mutated archives, memory"
	@echo "make docs    the site, in $(SITE)/"
	@echo "make test-pages   each page of the built site in Chromium (VIEWS=1: in one of four views)"
	@echo "make lab     JupyterLab on nbs/"
	@echo "make hooks   git refuses commits with outputs or a stale export"
	@echo "make clean-notebooks   clears outputs, as notebooks are committed"
	@echo "make clean   removes $(VENV) and $(SITE), keeps the workspace"

install: $(INSTALLED)

$(INSTALLED):
	@echo "installing into $(VENV), pinned by constraints.txt: some minutes and about 2 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@start=$$SECONDS; $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"; \
	  echo "installed in $$((SECONDS-start)) s, $$(du -sh $(VENV) | cut -f1)"
	@touch $@

study: install
	@$(BIN)/arxiv-study study $(STUDY)

test: install
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow --timeout 1800

docs: install
	$(BIN)/python docs/build.py --out $(SITE)

test-pages: install
	SITE="$(SITE)" VIEWS="$(VIEWS)" $(BIN)/python -m pytest tests/test_pages.py

lab: install
	$(BIN)/arxiv-study lab

hooks: install
	git config core.hooksPath .githooks

# nbdev-clean keeps outputs and, with clear_all, drops papermill's tag: so outputs are cleared apart from it.
clean-notebooks: install
	$(BIN)/python -m nbconvert --clear-output --inplace --log-level=ERROR nbs/*.ipynb nbs/*/*.ipynb runs/*.ipynb
	$(BIN)/nbdev-clean
	for notebook in runs/*.ipynb; do $(BIN)/nbdev-clean --fname $$notebook; done

clean:
	rm -rf $(VENV) $(SITE)
