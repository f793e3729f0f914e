# shellcheck shell=bash
# Sourced by the scripts for a real parent: finds strongroom, makes it where there is none, and hands over to it.
# STRONGROOM names another one, STRONGROOM_PREFIX another place for what bootstrap-parent installs.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
installed=${STRONGROOM_PREFIX:-/opt/strongroom}
script=$(basename "$0")

say() { printf '%s: %s\n' "$script" "$1" >&2; }

# Prints where strongroom is; nothing when it is not there yet.
found_strongroom() {
  local each
  for each in "${STRONGROOM:-}" "$installed/bin/strongroom" "$repository/.venv/bin/strongroom"; do
    if [ -n "$each" ] && [ -x "$each" ]; then
      printf '%s\n' "$each"
      return
    fi
  done
}

# has WORD ARGUMENTS...: whether WORD is one of the arguments.
has() {
  local wanted=$1 each
  shift
  for each in "$@"; do
    [ "$each" != "$wanted" ] || return 0
  done
  return 1
}

# The script's own comment, up to its first empty line.
help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# hand_over COMMAND ARGUMENTS...: becomes `strongroom nitro COMMAND ARGUMENTS...`.
hand_over() {
  local command=$1 program
  shift
  if has --help "$@" || has -h "$@"; then
    help
    program=$(found_strongroom)
    [ -z "$program" ] || exec "$program" nitro "$command" --help
    exit 0
  fi
  program=$(found_strongroom)
  if [ -z "$program" ]; then
    if has --dry-run "$@"; then
      printf 'run %s\nrun strongroom nitro %s %s\n' "$repository/scripts/setup" "$command" "$*"
      exit 0
    fi
    "$repository/scripts/setup" >&2
    program=$repository/.venv/bin/strongroom
  fi
  exec "$program" nitro "$command" "$@"
}
