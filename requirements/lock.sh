#!/usr/bin/env bash
# Renews the locks: every version pinned, every file by hash, no index address. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")"
lock() { uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
           --no-annotate --custom-compile-command requirements/lock.sh "$@"; }
lock --upgrade build.in -o build.txt
lock --upgrade all.in -o all.txt
lock --upgrade parent.in -o parent.txt
lock enclave.in -o enclave.txt
lock --upgrade bench.in -o bench.txt
lock --upgrade bench-engine.in -o bench-engine.txt
lock --upgrade bench-engine-python.in -o bench-engine-python.txt
lock --upgrade mutants.in -o mutants.txt
lock --upgrade meson.in -o meson.txt
lock --upgrade --no-deps model.in -o model.txt
