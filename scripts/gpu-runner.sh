#!/usr/bin/env bash
# One run on a machine with an NVIDIA driver: doctor, parity, transcripts, speed, blocks, kernels; a table and an archive.
#
#   scripts/gpu-runner.sh --minutes 8           here; results go into build/gpu, or into --out DIR
#   scripts/gpu-runner.sh --host user@machine   there, by rsync and ssh; the results come back into --out
#   scripts/gpu-runner.sh --offline BUNDLE      without network, from what `make gpu-bundle` has made
#   scripts/gpu-runner.sh --device cpu          rehearses the same without a GPU
#
# Every step has a limit, and runs whatever became of the one before (reference/gpu_run). Exit status: 0 if all steps
# succeeded, 1 if one did not, 2 for an unusable option. The only thing it asks sudo for is apt-get install of
# python3-venv and make, and of rsync on --host, each where it is missing.
set -uo pipefail

REMOTE=maxwhisper # the folder in the home of the other machine

usage() {
  echo "gpu-runner.sh: $1" >&2
  exit 2
}

host='' out='' offline='' options=()
while (($#)); do
  case $1 in
    --host) host=${2-}; [[ $host && $host != -* ]] || usage "--host needs user@machine" ;;
    --out) out=${2-}; [[ $out && $out != -* ]] || usage "--out needs a folder"; out=$(realpath -m -- "$out") ;;
    --offline) offline=${2-}; [[ -d $offline ]] || usage "--offline needs a bundle's folder, not '$offline'" ;;
    --minutes | --device) [[ ${2-} ]] || usage "$1 needs a value"; options+=("$1" "$2") ;;
    *) usage "$1 is not known: expected --minutes, --out, --device, --offline or --host" ;;
  esac
  shift 2
done
[[ $host && $offline ]] && usage "--host and --offline: send the bundle to the machine, and start its start.sh there"
[[ $offline ]] && offline=$(realpath -- "$offline")

cd "$(dirname "$0")/.." || exit 1
out=${out:-$PWD/build/gpu}

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

run_here() {
  [[ $offline ]] || install_packages
  exec python3 -m reference.gpu_run --out "$out" ${offline:+--offline "$offline"} "${options[@]}"
}

run_there() {
  command -v rsync >/dev/null || usage "--host needs rsync on this machine"
  # What is in single quotes runs there.
  ssh -- "$host" 'command -v rsync >/dev/null || { sudo=$( ((EUID == 0)) || echo sudo)
    $sudo apt-get update && $sudo apt-get install --yes rsync; }' || return
  rsync --archive --delete --exclude /.git --exclude /.venv --include /build/artifacts --exclude '/build/*' \
    --exclude __pycache__ ./ "$host:$REMOTE/" || return
  # shellcheck disable=SC2029  # REMOTE and options are meant to be put in on this side
  ssh -- "$host" "$REMOTE/scripts/gpu-runner.sh${options[*]:+ $(printf '%q ' "${options[@]}")}"
  local status=$?
  mkdir -p "$out" && rsync --archive "$host:$REMOTE/build/gpu/" "$out/" || return
  echo "results of $host in $out"
  return "$status"
}

if [[ $host ]]; then
  run_there
else
  run_here
fi
