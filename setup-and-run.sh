#!/usr/bin/env bash
# Installs, then trains. See usage below.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash setup-and-run.sh [--build-only | --test | --python | --help] [arguments]

  (nothing)              install, then train the default task
  key=value ...          the same with Hydra overrides
  --offline ...          the same with Isaac Lab's assets from a local mirror
  -- --cfg ...           the same with options of dreamer_isaac.py
  --build-only           install and stop
  --test [arguments]     install and run the tests; arguments go to pytest
  --python [arguments]   install and run its Python
  --test-container [...] the tests, less the embedded simulator's, with the versions of Isaac Lab's
                         container (Python 3.11, torch 2.7, numpy below 2) in .venv-container

Installs into .venv beside this file; in NVIDIA's Isaac Lab container into Isaac Lab's own Python, whose
torch and numpy stay as they are. A second start uses what the first has installed.

  PYTHON=/path/to/python3.12       another interpreter for .venv (3.11 to 3.13)
  ISAACLAB_PATH=/workspace/isaaclab  where Isaac Lab is, whose Python is then used; empty: .venv
  DREAMER_ISAAC_REPOSITORY, DREAMER_ISAAC_REF, DREAMER_ISAAC_FOLDER
                                   this file copied somewhere alone fetches the project with git
  ACCEPT_EULA=N                    do not accept NVIDIA's licence in your name (Isaac Sim then asks)
EOF
}
die() { printf 'setup-and-run.sh: %s\n' "$@" >&2; exit 1; }
misuse() { printf 'setup-and-run.sh: %s\n\n' "$1" >&2; usage >&2; exit 2; }

mode=train
case "${1:-}" in
  --build-only) mode=build; shift; [ $# -eq 0 ] || misuse "--build-only takes no arguments" ;;
  --test) mode="test"; shift ;;
  --test-container) mode="container"; shift ;;
  --python) mode=python; shift ;;
  --help | -h) usage; exit 0 ;;
  --) shift ;;
  *) for arg; do case "$arg" in --offline) ;; -*) misuse "unknown flag: $arg" ;; esac; done ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
if [ ! -e "$here/dreamer_isaac.py" ]; then # this file alone: fetch the rest and go on there
  from="${DREAMER_ISAAC_REPOSITORY:-}" to="${DREAMER_ISAAC_FOLDER:-$here/dreamer_isaac}"
  [ -n "$from" ] || die "the project is not beside this file." \
    "Say where to fetch it: DREAMER_ISAAC_REPOSITORY=<url> [DREAMER_ISAAC_REF=<branch or tag>]."
  if [ ! -e "$to/dreamer_isaac.py" ]; then
    rm -rf "$to.partial"
    git clone --quiet --depth 1 ${DREAMER_ISAAC_REF:+--branch "$DREAMER_ISAAC_REF"} -- \
      "$from" "$to.partial" || die "cannot fetch $from ${DREAMER_ISAAC_REF:-}."
    mv "$to.partial" "$to"
  elif [ -n "${DREAMER_ISAAC_REF:-}" ]; then
    echo "$to is there and is used as it is; DREAMER_ISAAC_REF is for fetching it." >&2
  fi
  case $mode in
    build) set -- --build-only ;;
    test) set -- --test "$@" ;;
    container) set -- --test-container "$@" ;;
    python) set -- --python "$@" ;;
    *) set -- -- "$@" ;;
  esac
  exec bash "$to/setup-and-run.sh" "$@"
fi
venv="$here/.venv"
log="$venv/install.log"
export TERM="${TERM:-xterm}" PYTHONNOUSERSITE=1 TD_GET_DEFAULTS_TO_NONE=1
# NVIDIA's licence is accepted here; docker/compose.yaml and cluster/description.yaml do it for theirs.
if [ "${ACCEPT_EULA:-Y}" != N ]; then export OMNI_KIT_ACCEPT_EULA=yes ACCEPT_EULA=Y PRIVACY_CONSENT=Y; fi

isaaclab="${ISAACLAB_PATH-/workspace/isaaclab}"
[ -n "$isaaclab" ] && [ -x "$isaaclab/isaaclab.sh" ] && [ "$mode" != container ] || isaaclab=""

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
  { grep -iE '^ *[a-z]*error' "$log" || cat "$log"; } | tail -n 8 | cut -c-300 >&2
  die "'$1' failed. $2" "All of its output: $log. The next start tries again."
}
pip_install() {
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -I -m pip install -q \
    --no-input --no-compile --progress-bar off "$@"
}


# Neither of the next two installs the project itself, which its scripts import.
[ -z "$isaaclab" ] && [ "$mode" != container ] || export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# -- Isaac Lab's own Python: add what is missing, touch nothing -----------------------------------

isaac() { "$isaaclab/isaaclab.sh" -p "$@"; }
# isaac_install LOCK: first block exactly, second block only what is not there.
isaac_install() {
  local missing
  missing="$(isaac -c 'import re, sys
from importlib.metadata import PackageNotFoundError, version
exact = True
for line in map(str.strip, open(sys.argv[1])):
    if line.startswith("# if missing"):
        exact = False
    if not line or line.startswith("#"):
        continue
    name, wanted = line.split("==")
    try:
        there = version(name)
    except PackageNotFoundError:
        there = ""
    if there != wanted and (exact or not there):
        print("ADD", line)' "$1" | sed -n 's/^ADD //p')"
  [ -n "$missing" ] || return 0
  printf '%s\n' "$missing" >"$here/.isaaclab-missing"
  isaac -m pip install -q --no-deps --no-input --progress-bar off -r "$here/.isaaclab-missing"
}
# Imports what a run needs and says whether torch and numpy are what they were.
isaac_check() {
  isaac -c 'import sys
from importlib.metadata import version
was = dict(pair.split("=") for pair in sys.argv[2].split())
for name, there in was.items():
    assert version(name) == there, f"{name} was {there} and is {version(name)} now"
sys.path.insert(0, sys.argv[1])
import fsspec, hydra, imageio, jinja2, jsonschema, matplotlib, omegaconf, tensordict, torchrl
from dreamer_isaac.cli import compose
compose(["env.backend=isaaclab"])
print("OK")' "$here" "$1" | grep -qx OK
}
# started PID: when it was started, in the kernel's clock ticks; nothing when it is gone.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || true; }
# members GROUP MARK: processes of that group that carry the mark of a run.
members() {
  local folder
  for folder in /proc/[0-9]*; do
    [ "$(sed 's/.*) //' "$folder/stat" 2>/dev/null | cut -d' ' -f3)" = "$1" ] || continue
    ! grep -qzxF "DREAMER_ISAAC_RUN=$2" "$folder/environ" 2>/dev/null || echo "${folder#/proc/}"
  done
}
# Ends what an earlier start of this script has left behind (Kit at times outlives its parent): only
# processes of a group that it has written down, and only if that start is gone itself.
end_orphans() {
  local file script born group left
  for file in "$here"/.pids/*; do
    [ -e "$file" ] || continue
    read -r script born group <"$file" || true
    [ "$(started "$script")" != "$born" ] || continue
    for signal in TERM KILL; do
      left="$(members "$group" "$file")"
      [ -n "$left" ] || break
      echo "ending what an earlier run left behind: $(tr '\n' ' ' <<<"$left")" >&2
      while read -r pid; do kill -s "$signal" "$pid" 2>/dev/null || true; done <<<"$left"
      for _ in 1 2 3 4 5 6 7 8 9 10; do [ -z "$(members "$group" "$file")" ] || sleep 1; done
    done
    rm -f "$file"
  done
}
# isaac_run ARGUMENTS...: Isaac Lab's Python in a process group of its own. Its wrappers are shells that
# die of a signal and leave Python running, so the group is signalled and waited for.
isaac_run() {
  local child mark left pid tenths code=0
  mkdir -p "$here/.pids"
  end_orphans
  mark="$here/.pids/$$.$(date +%s%N)"
  # What bash starts in the background ignores SIGINT unless told otherwise.
  DREAMER_ISAAC_RUN="$mark" env --default-signal=INT setsid "$isaaclab/isaaclab.sh" -p "$@" &
  child=$!
  echo "$$ $(started $$) $child" >"$mark"
  trap 'kill -TERM -- "-$child" 2>/dev/null' TERM
  trap 'kill -INT -- "-$child" 2>/dev/null' INT
  while :; do # a trap ends `wait` early
    code=0; wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # Python is still saving if a signal ended its wrapper; what is left after that is no use.
  for ((tenths = 0; tenths < ${DREAMER_ISAAC_PATIENCE:-120} * 10; tenths++)); do
    [ -n "$(members "$child" "$mark")" ] || break
    sleep 0.1
  done
  for signal in TERM KILL; do
    left="$(members "$child" "$mark")"
    [ -n "$left" ] || break
    echo "ending what the run left behind: $(tr '\n' ' ' <<<"$left")" >&2
    while read -r pid; do kill -s "$signal" "$pid" 2>/dev/null || true; done <<<"$left"
    sleep 2
  done
  rm -f "$mark"
  return $code
}
tools() {
  cat "$here/requirements.lock" "$here/requirements-dev.lock" |
    grep -E '^(pytest|pytest-timeout|pytest-xdist|pluggy|iniconfig|execnet|Pygments)=='
}

if [ -n "$isaaclab" ]; then
  log="$here/.isaaclab-install.log"
  # Isaac Lab shows a program one GPU; where there are two, one simulates and one learns.
  if [ -z "${CUDA_VISIBLE_DEVICES:-}" ] && command -v nvidia-smi >/dev/null; then
    gpus="$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)" || gpus="" # no driver
    gpus="$(head -n 2 <<<"$gpus" | paste -sd,)"
    [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="$gpus"
  fi
  # Beside the packages and not beside this file: the project may be mounted into a fresh container.
  stamp="$(isaac -c 'import sysconfig; print("IN", sysconfig.get_path("purelib"))' | sed -n 's/^IN //p')"
  stamp="$stamp/dreamer_isaac.stamp"
  now="$(cat "$here/requirements-container.lock" "$here/pyproject.toml" | sha256sum) $isaaclab"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$now" ]; then
    was="$(isaac -c 'from importlib.metadata import version
print("WAS", *(f"{n}={version(n)}" for n in ("torch", "numpy")))' 2>/dev/null | sed -n 's/^WAS //p')" || true
    [ -n "$was" ] || die "$isaaclab/isaaclab.sh -p has no torch and numpy."
    network="It needs the Python package index (a network, or pip's settings for a proxy or mirror)."
    step "Adding packages to Isaac Lab's Python ($was)" "$network" \
      isaac_install "$here/requirements-container.lock"
    step "Checking that it imports, and that torch and numpy are what they were" "" isaac_check "$was"
    printf '%s' "$now" >"$stamp"
  fi
  case $mode in
    build) echo "Installed in Isaac Lab's Python ($isaaclab)" ;;
    test)
      cd "$here"
      tools >"$here/.isaaclab-tools"
      step "Installing test tools" "" \
        isaac -m pip install -q --no-deps --no-input -r "$here/.isaaclab-tools"
      isaac_run -m pytest -q "$@" ;;
    python) isaac_run "$@" ;;
    train) isaac_run "$here/dreamer_isaac.py" "$@" ;;
  esac
  exit
fi

# -- the versions of the container, without it -----------------------------------------------------

if [ $mode = container ]; then
  venv="$here/.venv-container" log="$here/.venv-container/install.log"
  command -v "${PYTHON:-python3.11}" >/dev/null || die "needs Python 3.11, as the container has: PYTHON=..."
  now="$({ cat "$here/requirements-container.lock"; tools; } | sha256sum)"
  if [ "$(cat "$venv/done" 2>/dev/null)" != "$now" ]; then
    rm -rf "$venv" && mkdir "$venv"
    step "Creating .venv-container" "" "${PYTHON:-python3.11}" -I -m venv "$venv"
    step "Installing torch 2.7.0 and numpy 1.26.4 (minutes)" "It needs the Python package index and 6 GB." \
      pip_install torch==2.7.0 numpy==1.26.4
    { cat "$here/requirements-container.lock"; tools; } >"$venv/lock.txt"
    step "Installing the rest" "" pip_install --no-deps -r "$venv/lock.txt"
    printf '%s' "$now" >"$venv/done"
  fi
  cd "$here" && exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile "$@"
fi

# -- a virtual environment -------------------------------------------------------------------------

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
  python) exec "$venv/bin/python" "$@" ;;
  test) cd "$here" && exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile "$@" ;;
  train) exec "$venv/bin/python" "$here/dreamer_isaac.py" "$@" ;;
esac
