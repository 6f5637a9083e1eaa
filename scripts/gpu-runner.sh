#!/usr/bin/env bash
# From a fresh Ubuntu machine with an NVIDIA driver to a report: environment, doctor, GPU parity, perf, compare.
#
#   scripts/gpu-runner.sh [--out DIR]           here; DIR is build/gpu unless given
#   scripts/gpu-runner.sh --host user@machine   there, by rsync and ssh; the results come back into DIR
#
# Every step runs, whatever became of the one before, and leaves its output and its status in DIR. Exit status: 0 if all
# steps succeeded, 1 if one did not, 2 for an unusable option. It may be repeated: what is there already is kept.
# The only thing it asks sudo for is apt-get install of python3-venv and make, and of rsync on --host, each where it is
# missing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

CLIP=fixtures/clips/english-longer.ogg
CHECKPOINT=fixtures/nano.pt
REMOTE=maxwhisper # the folder in the home of the other machine

usage() {
  echo "$1: usage: scripts/gpu-runner.sh [--host user@machine] [--out DIR]" >&2
  exit 2
}

host='' out=build/gpu
while (($#)); do
  case $1 in
    --host) host=${2-}; [[ $host && $host != -* ]] || usage "--host needs user@machine" ;;
    --out) out=${2-}; [[ $out && $out != -* ]] || usage "--out needs a folder" ;;
    *) usage "$1 is not known" ;;
  esac
  shift 2
done

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# The packages of the system that are missing.
install_packages() {
  local packages=()
  python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
  command -v make >/dev/null || packages+=(make)
  ((${#packages[@]} == 0)) && return
  echo "installing ${packages[*]}"
  as_root apt-get update && as_root apt-get install --yes "${packages[@]}"
}

environment() {
  install_packages && make setup
}

parity() {
  make gpu-parity DTYPE=float16,bfloat16 REPORT="$out/parity"
}

# A step of its own, since no GPU has been judged in it yet; where something is TF32, its report says so.
float32() {
  make gpu-parity REPORT="$out/float32"
}

perf() {
  make gpu-perf REPORT="$out/perf"
}

compare() {
  .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[peers,cuda12]' || return
  .venv/bin/maxwhisper compare "$CLIP" --model "$CHECKPOINT" --device gpu --json "$out/compare.json" || return
  .venv/bin/python fixtures/make.py talk || return
  local size
  for size in tiny large-v3; do
    .venv/bin/maxwhisper compare fixtures/cache/talk.wav --model "random:$size" --tokens 100 --device gpu --batch_size 32 \
      --json "$out/compare-$size.json" || return
  done
}

doctor() {
  .venv/bin/maxwhisper doctor --json >"$out/doctor.json"
  make doctor
}

# One step: its output goes to the terminal and into a file, its status into the table.
step() {
  local name=$1 start=$SECONDS status
  echo "== $name"
  "$name" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  printf '%s\t%s\t%s s\n' "$name" "$([[ $status == 0 ]] && echo ok || echo "failed ($status)")" $((SECONDS - start)) \
    >>"$out/steps.tsv"
  ((status == 0)) || failed=1
}

run_here() {
  mkdir -p "$out" || exit 1
  : >"$out/steps.tsv"
  failed=0
  for name in environment doctor parity float32 perf compare; do
    step "$name"
  done
  echo "== results in $out"
  cat "$out/steps.tsv"
  return "$failed"
}

run_there() {
  command -v rsync >/dev/null || usage "--host needs rsync on this machine"
  # What is in single quotes runs there.
  ssh -- "$host" 'command -v rsync >/dev/null || { sudo=$( ((EUID == 0)) || echo sudo)
    $sudo apt-get update && $sudo apt-get install --yes rsync; }' || return
  rsync --archive --delete --exclude /.git --exclude /.venv --exclude /build --exclude __pycache__ ./ "$host:$REMOTE/" ||
    return
  # shellcheck disable=SC2029  # REMOTE is meant to be put in on this side
  ssh -- "$host" "$REMOTE/scripts/gpu-runner.sh --out build/gpu"
  local status=$?
  mkdir -p "$out" && rsync --archive "$host:$REMOTE/build/gpu/" "$out/" || return
  echo "== results of $host in $out"
  return "$status"
}

if [[ $host ]]; then
  run_there
else
  run_here
fi
