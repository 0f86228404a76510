# Sourced by dev/root and dev/enter: where things are, and how to become root.
# shellcheck shell=bash

umask 022
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${PG_FERRET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pg_ferret}
pg_bin=/usr/lib/postgresql/18/bin

say() { printf 'pg_ferret: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# Runs a command as root. A plain user needs sudo, and is told so instead of seeing a failing mount.
as_root() {
  if [[ $EUID -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "root is needed for '$1': run this as root, or install sudo"
  fi
}

# Installs the missing ones of the named host programs (program names equal package names, but for bwrap).
need_programs() {
  local program packages=()
  for program in "$@"; do
    command -v "$program" >/dev/null && continue
    case $program in bwrap) packages+=(bubblewrap) ;; *) packages+=("$program") ;; esac
  done
  [[ ${#packages[@]} -eq 0 ]] && return
  command -v apt-get >/dev/null || die "install ${packages[*]} first (this host has no apt-get)"
  say "installing ${packages[*]} on this host"
  as_root apt-get update -qq >&2 &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2 ||
    die "could not install ${packages[*]}: is the network reachable? The next call tries again."
}
