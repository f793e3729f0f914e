PROMPT ?= Why is the sky blue? Answer in two sentences.
export PROMPT
PY := .venv/bin/python

.PHONY: demo test setup lint types imports unit properties fuzz bench vectors clean

demo: setup  ## One question through an emulated enclave, verified and sealed
	@.venv/bin/strongroom run --prompt "$$PROMPT"

test: setup lint types imports unit  ## Every check and every test

setup:
	@scripts/setup

lint:
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types:
	@.venv/bin/mypy
	@.venv/bin/mypy scripts/make-vectors

imports:
	@.venv/bin/lint-imports

unit:
	@$(PY) -m pytest

properties: setup  ## The property tests alone, with new examples at every run and many more of them
	@$(PY) -m pytest --hypothesis-profile=new -m hypothesis

fuzz: setup  ## Coverage-guided fuzzing of every parser of foreign bytes; SECONDS=60 for each
	@$(PY) -m fuzz --seconds $(or $(SECONDS),60)

bench: setup  ## The table in bench/README.md, from one run
	@$(PY) -m bench

vectors: setup  ## Writes tests/vectors anew
	@$(PY) scripts/make-vectors

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
