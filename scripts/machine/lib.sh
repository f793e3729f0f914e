# shellcheck shell=bash
# What the scripts of this folder share: options, missing tools, the cache, and packages of other suites of Debian. Sourced, not run:
#
#   . "$(dirname "$0")/lib.sh"
#   options "$@"                              # --help, --no-cache, --latest, --install; the comment at the top of the script is its help
#   need flex flex; need bc bc; needs_met     # exit 2 with one line that says what to install
#   recipe FILE... -- WORD...                 # all that goes in, but for the version of the package
#   cache_newest qemu                         # ends the script here, when a complete entry of this recipe exists
#   version=$(apt_source_version trixie qemu)
#   cache_begin qemu "$version" 3             # locks; ends the script here, when another one has made the entry by now
#   run "compiling" make -C "$work" ...       # $work is an empty folder on the cache's file system
#   cache_end                                 # renames it and prints its path: the only line on stdout
#
# An entry is whole or absent: it is made beside its place and renamed; whatever ends the script removes what was half made.

set -euo pipefail
shopt -s inherit_errexit
umask 022
export LC_ALL=C

self=$(basename "$0")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/strongroom
use_cache=true
ask_archive=false
install_missing=false
missing_tools=()
missing_packages=()
recipe_digest=
work=
entry=
scratch=
job=
ticker=

say() { printf '%s: %s\n' "$self" "$1" >&2; }
fail() { say "$1"; exit "${2:-1}"; }

# ---- options ----

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage; exit 0 ;;
      --no-cache) use_cache=false ;;
      --latest) ask_archive=true ;;
      --install) install_missing=true ;;
      *) say "unknown argument: $1"; usage >&2; exit 2 ;;
    esac
    shift
  done
}

# ---- what is missing ----

# need TOOL PACKAGE: TOOL is a command, or a file if it has a slash.
need() {
  case $1 in
    */*) [ -e "$1" ] && return ;;
    *) command -v "$1" >/dev/null && return ;;
  esac
  missing_tools+=("$1")
  missing_packages+=("$2")
}

needs_met() {
  [ ${#missing_packages[@]} -gt 0 ] || return 0
  local packages
  packages=$(printf '%s\n' "${missing_packages[@]}" | sort -u | tr '\n' ' ')
  if $install_missing && [ "$(id -u)" = 0 ]; then
    run "asking for Debian's packages" apt-get update # a fresh container has no lists
    # shellcheck disable=SC2086  # one word for each package
    run "installing $packages" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
    missing_tools=() missing_packages=()
    return
  fi
  fail "missing: ${missing_tools[*]}; on Debian: apt-get install $packages(or run as root with --install)" 2
}

# ---- running what takes long ----

# run LABEL COMMAND...: its output goes to a log, a line every 30 s says that it lives, and the end of the log is shown when it fails.
run() {
  local label=$1 log began=$SECONDS status=0
  shift
  make_scratch
  log=$scratch/log
  say "$label"
  # Inside a $(...) the script's own trap does not hold.
  [ "$BASHPID" = $$ ] || trap 'kill_group "$ticker"; end_group "$job"' EXIT
  # A group of its own, so that all of it can be ended; without the lock, so that nothing that stays behind holds it.
  set -m
  "$@" >"$log" 2>&1 </dev/null 9>&- &
  job=$!
  (
    while sleep 30; do
      say "still $label ($(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s) $(tail -c 300 "$log" | tail -n 1 | cut -c -100)"
    done
  ) >/dev/null 9>&- &
  ticker=$!
  set +m
  wait "$job" || status=$?
  job=
  kill_group "$ticker"
  ticker=
  [ "$status" = 0 ] && return
  tail -n 30 "$log" >&2
  fail "$label failed with status $status"
}

# end_group PID: lets a job and all that it started end by itself, for 5 s.
end_group() {
  [ -n "$1" ] || return 0
  kill -TERM -- "-$1" 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 -- "-$1" 2>/dev/null || break
    sleep 0.1
  done
  kill_group "$1"
}
kill_group() {
  [ -n "$1" ] || return 0
  kill -KILL -- "-$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

clean() {
  [ "$BASHPID" = $$ ] || return 0 # a subshell that was ended before it had forgotten this trap
  kill_group "$ticker"
  end_group "$job"
  [ -z "$work" ] || rm -rf "$work"
  [ -z "$scratch" ] || rm -rf "$scratch"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Not in the cache: apt's own user has to reach it.
make_scratch() {
  [ -n "$scratch" ] && return
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/strongroom-$self-XXXXXX")
  chmod 755 "$scratch"
}

# ---- the cache ----

# recipe FILE... -- WORD...: the digest of this script, the files' contents and the words. This library is not in it: it fetches and
# keeps, and a change here is no reason to compile for minutes.
recipe() {
  local files=("$0")
  while [ $# -gt 0 ] && [ "$1" != -- ]; do files+=("$1"); shift; done
  [ $# -eq 0 ] || shift
  local digests
  digests=$(for file in "${files[@]}"; do sha256sum <"$file"; done)
  recipe_digest=$(printf '%s\n' "$digests" "$@" | sha256sum | cut -d ' ' -f 1)
}

# require_own PATH...: what is in the cache gets into images and runs as this user, so nobody else but root may have put it there.
require_own() {
  local found
  found=$(find -H "$@" ! -type l \( ! -uid "$(id -u)" ! -uid 0 -o -perm /022 \) -print -quit)
  [ -z "$found" ] || fail "$found: others than this user can write there; remove it, or set XDG_CACHE_HOME to a folder of your own" 2
}

hit() {
  require_own "$1"
  printf 'cache: %s (hit)\n' "$1" >&2
  printf '%s\n' "$1"
  exit 0
}

# cache_newest NAME: the newest entry of this recipe, whatever version of the package it was made of. Asking the archive is slow.
cache_newest() {
  local found newest=
  if ! $use_cache || $ask_archive; then return 0; fi
  [ ! -e "$cache" ] || require_own "$cache" -maxdepth 0
  for found in "$cache/$1"-*/recipe; do
    if ! [ -f "$found" ] || [ "$(cat "$found")" != "$recipe_digest" ]; then continue; fi
    if [ -z "$newest" ] || [ "$found" -nt "$newest" ]; then newest=$found; fi
  done
  [ -z "$newest" ] || hit "$(dirname "$newest")"
}

# cache_begin NAME VERSION MINUTES: sets $entry, where the result will be, and $work, where it is made.
cache_begin() {
  local key
  key=$(printf '%s\n' "$recipe_digest" "$2" | sha256sum | cut -c -16)
  mkdir -p "$cache"
  require_own "$cache" -maxdepth 0
  exec 9>"$cache/.$1-$key.lock"
  flock --nonblock 9 || { say "another process is building $1 $2; waiting for it"; flock 9; }
  entry=$cache/$1-$key
  if $use_cache && [ -d "$entry" ]; then hit "$entry"; fi
  printf 'building %s %s, about %s min\n' "$1" "$2" "$3" >&2
  work=$cache/.$1-$key.partial
  rm -rf "$work" # of a process that was killed
  mkdir "$work"
}

# cache_end [FILE...]: keeps the named files and folders of $work, or all of it.
cache_end() {
  local kept
  if [ $# -gt 0 ]; then
    kept=$work.kept
    rm -rf "$kept"
    mkdir "$kept"
    mv -- "${@/#/$work/}" "$kept"
    rm -rf "$work"
    work=$kept
  fi
  printf '%s\n' "$recipe_digest" >"$work/recipe"
  rm -rf "$entry" # with --no-cache
  mv -T "$work" "$entry"
  work=
  say "done after $((SECONDS / 60)) min $((SECONDS % 60)) s"
  printf '%s\n' "$entry"
}

# ---- packages of any suite of Debian ----
# apt's own configuration of this machine says where a mirror is, in whatever format, and by what proxy. The suite is replaced; lists, cache and
# status are private, so that the system stays as it is. What is fetched is verified as apt always does: the suite's signature by a key of
# this machine's keyring of Debian, and every file by its digest, whatever this machine takes without.
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# Configuration of apt: nothing without a signature, and none with an algorithm that is given up.
apt_signed() {
  cat <<'CONFIGURATION'
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
CONFIGURATION
}

# shellcheck disable=SC2016  # the $(...) are apt's
index_targets() { apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null || true; }

# mirror_of SUITE: its URI.
mirror_of() {
  local codename targets mirror security
  codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  targets=$(index_targets)
  if [ -z "$targets" ] && $install_missing && [ "$(id -u)" = 0 ]; then
    apt-get -qq update >&2 # a fresh container has no lists, and without them apt does not say what it would ask
    targets=$(index_targets)
  fi
  first() { awk -v release="^($1)\$" '$2 ~ release && $3 == "main" { print $1; exit }' <<<"$targets"; }
  mirror=$(first "$codename|sid|unstable|testing|stable|oldstable")
  security=$(first "($codename|testing|stable|oldstable)-security")
  case $1 in
    *-security)
      # Beside the archive itself, where the configuration names none for it.
      case $mirror in */debian | */debian/) mirror=${mirror%/}-security/ ;; *) mirror= ;; esac
      mirror=${security:-$mirror}
      ;;
  esac
  [ -n "$mirror" ] || fail "apt's lists name no mirror of Debian for the suite $1: apt-get update (or run as root with --install)" 2
  printf '%s\n' "$mirror"
}

# apt_open SUITE: a private state for SUITE in $scratch/apt-SUITE, whose apt.conf makes apt's tools use it. Its lists are fetched once.
apt_open() {
  local suite=$1 state=$scratch/apt-$1 uri
  if [ ! -f "$state/ready" ]; then
    need "$debian_keyring" debian-archive-keyring
    needs_met
    uri=$(mirror_of "$suite")
    mkdir -p "$state"/{sources,lists/partial,archives/partial}
    : >"$state/status"
    {
      printf 'Types: deb deb-src\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$uri" "$suite" "$debian_keyring"
    } >"$state/sources/one.sources"
    cat >"$state/apt.conf" <<CONFIGURATION
Dir::State "$state";
Dir::State::lists "$state/lists";
Dir::State::status "$state/status";
Dir::Cache "$state";
Dir::Cache::archives "$state/archives";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$state/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear Acquire::IndexTargets::deb::DEP-11;
CONFIGURATION
    apt_signed >>"$state/apt.conf"
    run "asking the archive for $suite" update_lists "$state/apt.conf" "$suite"
    touch "$state/ready"
  fi
}

# apt_in SUITE TOOL ARGUMENT...: one of apt's tools with that state.
apt_in() {
  local conf=$scratch/apt-$1/apt.conf tool=$2
  apt_open "$1"
  shift 2
  "$tool" --config-file "$conf" "$@"
}

update_lists() {
  local answer
  answer=$(apt-get --config-file "$1" --error-on=any -q update 2>&1) && return
  printf '%s\n' "$answer"
  if grep -q -e NO_PUBKEY -e 'is not signed' <<<"$answer"; then
    say "this machine has no key for the suite $2: install a newer debian-archive-keyring"
  fi
  return 1
}

# apt_version SUITE PACKAGE, apt_source_version SUITE SOURCE: the newest version there.
apt_version() {
  local version
  version=$(apt_in "$1" apt-cache madison "$2" | awk -F ' *\\| *' '$3 ~ / Packages$/ { print $2; exit }')
  [ -n "$version" ] || fail "the suite $1 has no package $2" 2
  printf '%s\n' "$version"
}
apt_source_version() {
  local versions version newest=
  versions=$(apt_in "$1" apt-cache showsrc --only-source "$2" | sed -n 's/^Version: //p')
  for version in $versions; do
    if [ -z "$newest" ] || dpkg --compare-versions "$version" gt "$newest"; then newest=$version; fi
  done
  [ -n "$newest" ] || fail "the suite $1 has no source package $2" 2
  printf '%s\n' "$newest"
}

# fetch SUITE FOLDER APT-GET'S ARGUMENTS...: in a folder that apt's own user can reach, then moved.
fetch() {
  local suite=$1 folder=$2 landing
  shift 2
  apt_open "$suite"
  landing=$(mktemp -d "$scratch/landing-XXXXXX")
  [ "$(id -u)" != 0 ] || chown _apt "$landing"
  run "fetching ${*: -1}" env -C "$landing" apt-get --config-file "$scratch/apt-$suite/apt.conf" -q "$@"
  mv "$landing"/* "$folder"
}

# apt_deb SUITE PACKAGE VERSION FOLDER: fetches the package's .deb into FOLDER and prints its path.
apt_deb() {
  fetch "$1" "$4" download "$2=$3"
  printf '%s\n' "$4/$2"_*.deb
}

# apt_source SUITE SOURCE VERSION FOLDER: fetches the source package into FOLDER and prints the path of its .dsc (dpkg-source unpacks it).
apt_source() {
  fetch "$1" "$4" --download-only --only-source source "$2=$3"
  printf '%s\n' "$4/$2"_*.dsc
}

make_scratch
