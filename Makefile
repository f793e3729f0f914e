PROMPT ?= Why is the sky blue? Answer in two sentences.
export PROMPT
PY := .venv/bin/python

.PHONY: demo demo-kms eif test test-boot setup lint types imports coverage rest unit properties fuzz soak mutants bench bench-engine vectors clean

demo: setup  ## One question through an emulated enclave, verified and sealed
	@.venv/bin/strongroom run --prompt "$$PROMPT"

demo-kms: setup  ## From no key to "only this image can decrypt": docs/kms.md, run as it stands against an emulated KMS
	@scripts/demo-kms

# Side by side: the tests on two workers of their own, and beside them one check after the other, each of which says what it has to say at its end.
test: setup  ## Every check and every test
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target rest lint types imports coverage

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

# What the gate asks for in full: 100 % of the branches of attestation/, by the tests of it alone.
COVERED := tests/attestation tests/attestation_model

coverage:  ## Those tests, and the lines and branches of attestation/ that they miss
	@$(PY) -m coverage run -m pytest $(COVERED)
	@$(PY) -m coverage report

rest:
	+@$(PY) -m pytest --numprocesses=2 --dist=loadgroup $(addprefix --ignore=,$(COVERED))

unit: coverage rest

eif: setup  ## build/enclave.eif from this source, with the record of what went in; as root on Debian, 20 minutes the first time
	@scripts/eif --install

test-boot:  ## Enclave images booted in QEMU's Nitro machine, and one asked for an answer; as root on Debian
	@scripts/test-boot --check
	@$(MAKE) --no-print-directory setup
	@scripts/test-boot --install

properties: setup  ## The property tests alone, with new examples at every run and many more of them
	@$(PY) -m pytest --hypothesis-profile=new -m hypothesis

fuzz: setup  ## Coverage-guided fuzzing of every parser of foreign bytes; SECONDS=60 for each
	@$(PY) -m fuzz --seconds $(or $(SECONDS),60)

soak: setup  ## Some ten thousand mixed requests, many given up half-way, and what is left of them; REQUESTS=10000
	@STRONGROOM_SOAK_REQUESTS=$(or $(REQUESTS),10000) $(PY) -m pytest tests/enclave/test_soak.py

mutants:  ## Which changes of the verifier no test notices; an hour or two, with an environment of its own
	@scripts/mutants

bench: setup  ## The table in bench/README.md, from one run
	@$(PY) -m pip --disable-pip-version-check --quiet install --no-deps --only-binary :all: --require-hashes -r requirements/bench.txt \
	  || echo "bench: a peer has no wheel for this machine; its row will say so" >&2
	@$(PY) -m bench

bench-engine: setup  ## The engine against llama.cpp's own servers: build/bench/engine; hours, and the peers are compiled first
	@$(PY) -m bench.engine

vectors: setup  ## Writes tests/vectors anew
	@$(PY) scripts/make-vectors

clean:
	rm -rf .venv .venv-mutants mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
