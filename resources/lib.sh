# Shared by the scripts of resources/, tests/ and the Makefile; sourced, never run.
# What lives here: where things are, how scripts speak, how a Debian package is fetched and unpacked.
# shellcheck shell=bash

HULL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything downloaded or built outside Cargo's target directory; safe to delete at any time.
HULL_CACHE=${HULL_CACHE:-$HULL_ROOT/.cache}

# Progress goes to stderr: stdout of a recipe is the path of what it made.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die MESSAGE [HINT]
die() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2
  exit 1
}

# as_root CMD…: runs CMD with root's rights, through sudo where needed.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "'$*' needs root" "run as root, or install sudo"
  fi
}

# Debian keeps depmod, mke2fs and their like outside a user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# need TOOL…: fails with one hint for all that is missing.
need() {
  local tool missing=""
  for tool; do command -v "$tool" >/dev/null || missing+=" $tool"; done
  [ -z "$missing" ] || die "not installed:$missing" "resources/setup installs what Hull's scripts need"
}

# scratch: a new directory in the cache that goes when the script ends. On the cache's own
# file system, so that the finished thing is renamed into place, never half there.
scratch() {
  mkdir -p "$HULL_CACHE"
  SCRATCH=$(mktemp -d "$HULL_CACHE/tmp.XXXXXX")
  trap 'rm -rf "$SCRATCH"' EXIT
  # A signal ends the script through its EXIT trap as well.
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}

# lock NAME: one process at a time makes the thing of that name; held until the script ends.
lock() {
  mkdir -p "$HULL_CACHE"
  exec 9>"$HULL_CACHE/$1.lock"
  flock 9
}

# candidate PACKAGE: the version apt would install, empty if it knows none.
candidate() {
  apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# know PACKAGE: makes sure apt's index knows PACKAGE, updating the index once if it does not.
know() {
  [ -z "$(candidate "$1")" ] || return 0
  say "updating the package index"
  as_root apt-get -q update >&2
  [ -n "$(candidate "$1")" ] || die "apt knows no package '$1'" "is this Debian, with its main archive enabled?"
}

# unpack_package PACKAGE DIR: downloads PACKAGE, checked by apt against the archive's
# signatures, and unpacks it into DIR without installing it. Needs no root.
unpack_package() {
  local into
  into=$(mktemp -d "$SCRATCH/deb.XXXXXX")
  say "downloading $1 $(candidate "$1")"
  # The sandbox user cannot write into a private directory; we are only downloading.
  (cd "$into" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "$1" >&2) ||
    die "download of $1 failed"
  dpkg -x "$into"/*.deb "$2"
  rm -rf "$into"
}

# static_busybox: prints the path of Debian's static busybox, fetched once.
static_busybox() {
  local at=$HULL_CACHE/busybox
  if [ ! -x "$at" ]; then
    know busybox-static
    unpack_package busybox-static "$SCRATCH/busybox"
    local found
    for found in "$SCRATCH"/busybox/{usr/,}bin/busybox; do
      [ ! -x "$found" ] || mv "$found" "$at"
    done
  fi
  printf '%s\n' "$at"
}

# module_closure KERNEL_DIR MODULE…: file names of the modules and of all they need, in an
# order in which insmod takes them. A module that is built in needs no file.
module_closure() {
  local kernel=$1 base
  shift
  base=$kernel/modules/lib/modules/$(cat "$kernel/release")
  awk -v base="$base" -v wanted="$*" '
    function name(file) { sub(/.*\//, "", file); sub(/\.ko.*/, "", file); gsub(/-/, "_", file); return file }
    function visit(file,   i, n, parts) {
      if (file in done) return
      done[file] = 1
      n = split(needs[file], parts, " ")
      for (i = n; i >= 1; i--) visit(parts[i])
      print base "/" file
    }
    FILENAME ~ /modules.builtin$/ { builtin[name($1)] = 1; next }
    { file = $1; sub(/:$/, "", file); path[name(file)] = file
      $1 = ""; needs[file] = $0 }
    END {
      n = split(wanted, list, " ")
      for (i = 1; i <= n; i++) {
        module = name(list[i])
        if (module in path) visit(path[module])
        else if (!(module in builtin)) { print "no module " list[i] > "/dev/stderr"; exit 1 }
      }
    }' "$base/modules.builtin" "$base/modules.dep"
}

# copy_modules KERNEL_DIR DIR ORDER MODULE…: puts the closure into DIR, uncompressed (busybox's
# insmod takes nothing else), and their order of loading into the file DIR/ORDER.
copy_modules() {
  local kernel=$1 into=$2 order=$2/$3 file name
  shift 3
  mkdir -p "$into"
  module_closure "$kernel" "$@" >"$SCRATCH/closure" || die "the kernel in $kernel lacks a module"
  : >"$order"
  while read -r file; do
    name=${file##*/}
    case $name in
      *.ko) cp "$file" "$into/$name" ;;
      *.ko.xz) xz -dc "$file" >"$into/${name%.xz}" ;;
      *.ko.zst) zstd -qdc "$file" >"$into/${name%.zst}" ;;
      *) die "do not know how $name is compressed" ;;
    esac
    printf '%s\n' "${name%.ko*}.ko" >>"$order"
  done <"$SCRATCH/closure"
}

# pack_cpio TREE FILE: the tree as an uncompressed newc archive, owned by root, renamed into place.
# Uncompressed because unpacking costs a guest more than copying a few MiB costs the host.
pack_cpio() {
  local busybox=$HULL_CACHE/busybox
  # Times are fixed and names sorted, so that equal content makes equal archives.
  find "$1" -exec touch -h -d @0 {} +
  (cd "$1" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$SCRATCH/cpio"
  mkdir -p "$(dirname "$2")"
  mv "$SCRATCH/cpio" "$2"
}
