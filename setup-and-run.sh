#!/usr/bin/env bash
# Installs into .venv beside this file, then trains. See usage below.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash setup-and-run.sh [--build-only | --test | --help] [arguments]

  (nothing)            install, then train the default task
  key=value ...        the same with Hydra overrides
  --offline ...        the same with Isaac Lab's assets from a local mirror
  -- --cfg ...         the same with options of dreamer_isaac.py
  --build-only         install and stop
  --test [arguments]   install and run the tests; arguments go to pytest

PYTHON=/path/to/python3.12 chooses the interpreter (3.11 to 3.13).
A second start uses what the first has installed.
EOF
}
die() { printf 'setup-and-run.sh: %s\n' "$@" >&2; exit 1; }
misuse() { printf 'setup-and-run.sh: %s\n\n' "$1" >&2; usage >&2; exit 2; }

mode=train
case "${1:-}" in
  --build-only) mode=build; shift; [ $# -eq 0 ] || misuse "--build-only takes no arguments" ;;
  --test) mode="test"; shift ;;
  --help | -h) usage; exit 0 ;;
  --) shift ;;
  *) for arg; do case "$arg" in --offline) ;; -*) misuse "unknown flag: $arg" ;; esac; done ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
venv="$here/.venv"
log="$venv/install.log"
export TERM="${TERM:-xterm}" OMNI_KIT_ACCEPT_EULA=yes PYTHONNOUSERSITE=1 TD_GET_DEFAULTS_TO_NONE=1

# Prints the interpreter to install with (never a virtual environment's own: .venv gets replaced).
find_python() {
  local name says found="" names=(python3 python3.12 python3.11 python3.13)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    command -v "$name" >/dev/null || continue
    says="$("$name" -I -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(print("is", sys.version.split()[0]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit(print("has no venv (on Debian and Ubuntu: apt install python3-venv)"))
print("/" + sys._base_executable)' 2>/dev/null)" || says="does not run"
    case "$says" in /*) echo "${says#/}"; return ;; esac
    found="${found:+$found; }$name $says"
  done
  die "needs Python 3.11, 3.12 or 3.13 with venv. Found: ${found:-no ${names[*]}}." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash setup-and-run.sh"
}

# fingerprint PYTHON FILES...: what an installation depends on, as a hash.
fingerprint() {
  "$1" -I -c 'import hashlib, sys
parts = [sys.version.encode(), sys.argv[1].encode(), *(open(f, "rb").read() for f in sys.argv[2:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())' "$here" "${@:2}" 2>/dev/null
}
# installed NAME FILES...: does the stamp, written last, still hold?
installed() {
  local was; was="$(cat "$venv/stamp-$1" 2>/dev/null)" || return 1
  [ "$(fingerprint "$venv/bin/python" "${@:2}")" = "$was" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$(fingerprint "$PYTHON" "${@:2}")" = "$was" ]
}
stamp() { fingerprint "$venv/bin/python" "${@:2}" >"$venv/stamp-$1"; }

# step NAME REMEDY COMMAND...: one line with the seconds taken; the command's output goes to a log.
step() {
  local start=$SECONDS
  printf '%s ... ' "$1" >&2
  if "${@:3}" >>"$log" 2>&1; then printf '%d s\n' $((SECONDS - start)) >&2; return; fi
  printf 'failed\n' >&2
  { grep -iE '^ *(os)?error' "$log" || cat "$log"; } | tail -n 8 | cut -c-300 >&2
  die "'$1' failed. $2" "All of its output: $log. The next start tries again."
}
pip_install() {
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -I -m pip install -q \
    --no-input --no-compile --progress-bar off "$@"
}

base=("$here/requirements.lock" "$here/pyproject.toml")
dev=("${base[@]}" "$here/requirements-dev.lock" "$here/requirements-isaaclab.lock")
network="It needs the Python package index (a network, or pip's settings for a proxy or mirror) and 10 GB of disk."
if ! installed run "${base[@]}" || { [ $mode = test ] && ! installed dev "${dev[@]}"; }; then
  exec 9>"$here/.venv.lock" || die "cannot write in $here."
  ! command -v flock >/dev/null || flock 9 || true # a second start waits for the first
  if ! installed run "${base[@]}"; then
    python="$(find_python)"
    if [ -e "$venv" ] && [ ! -e "$log" ]; then mv "$venv" "$venv.old.$$"; fi # not made here: keep it
    rm -rf "$venv" && mkdir "$venv"
    step "Creating .venv with $python" "Is its venv module whole?" "$python" -I -m venv "$venv"
    step "Installing dependencies (minutes)" "$network" pip_install -r "$here/requirements.lock"
    step "Installing dreamer_isaac" "Can $here be written to?" \
      pip_install --no-deps --no-build-isolation -e "$here"
    stamp run "${base[@]}"
  fi
  if [ $mode = test ] && ! installed dev "${dev[@]}"; then
    step "Installing test tools" "$network" pip_install -r "$here/requirements-dev.lock"
    rm -rf "$venv/isaaclab-2.3.2" # its wheel says Python 3.11; its configuration classes take any
    step "Installing Isaac Lab's configuration classes for the tests" "$network" pip_install \
      --no-deps --python-version 3.11 --only-binary=:all: --target "$venv/isaaclab-2.3.2" \
      -r "$here/requirements-isaaclab.lock"
    stamp dev "${dev[@]}"
  fi
  exec 9>&-
fi

case $mode in
  build) echo "Installed in $venv" ;;
  test) cd "$here" && exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile "$@" ;;
  train) exec "$venv/bin/python" "$here/dreamer_isaac.py" "$@" ;;
esac
