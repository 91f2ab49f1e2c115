# Decides where stock Linux guests can run; sourced by the scripts that start them.
# shellcheck shell=bash disable=SC2034

# where_guests_run: sets WHERE to direct or lab, and WHY to the reason for it. HULL_LAB=1 or 0 forces it.
where_guests_run() {
  WHERE=lab
  if [ "${HULL_LAB:-}" = 1 ]; then
    WHY="HULL_LAB=1"
  elif [ "${HULL_LAB:-}" = 0 ]; then
    WHERE=direct WHY="HULL_LAB=0"
  elif [ ! -c /dev/kvm ]; then
    WHY="there is no /dev/kvm"
  elif [ -e /sys/module/kvm_pvm ]; then
    WHY="KVM here is PVM, without hardware behind it: a stock kernel does not boot on it"
  elif ! grep -qwE 'vmx|svm' /proc/cpuinfo; then
    WHY="the CPU offers neither vmx nor svm"
  elif [ ! -e /sys/module/kvm_intel ] && [ ! -e /sys/module/kvm_amd ]; then
    WHY="neither kvm_intel nor kvm_amd is loaded"
  else
    WHERE=direct WHY="KVM has hardware behind it"
  fi
}

# release_hull: builds Hull unless HULL names a binary, and sets HULL.
release_hull() {
  if [ -z "${HULL:-}" ]; then
    say "building Hull (release)"
    (cd "$HULL_ROOT" && cargo build --release --locked -p hull)
    HULL=$(target_dir)/release/hull
  fi
  [ -x "$HULL" ] || die "there is no $HULL"
}

# target_dir: where Cargo puts what it builds for the target named in .cargo/config.toml.
target_dir() {
  printf '%s/x86_64-unknown-linux-gnu\n' "${CARGO_TARGET_DIR:-$HULL_ROOT/target}"
}
