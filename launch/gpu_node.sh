#!/usr/bin/env bash
# Runs a recipe on this machine with all of its GPUs (CUDA_VISIBLE_DEVICES chooses some), and again while it is stopped
# from elsewhere (exit status 75). Ctrl-C or SIGTERM to this script stops it for good, with everything saved.
#
#   launch/gpu_node.sh [--dry-run] configs/RECIPE.yaml [key=value ...]
#
# Read from the environment: M3PO_VERB (run), M3PO_VENV (a virtual environment to activate), MAX_RESTARTS (20).
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then dry_run=1; shift; fi
[[ $# -ge 1 && "$1" != -* ]] || usage
recipe=$1
shift
command=(m3po "${M3PO_VERB:-run}" --config "$recipe" "$@")
printf '+' && printf ' %q' "${command[@]}" && printf '\n'
[[ $dry_run -eq 0 ]] || exit 0

if [[ -n "${M3PO_VENV:-}" ]]; then
  # shellcheck disable=SC1091
  source "$M3PO_VENV/bin/activate"
fi
stopped=0
signalled=0
child=
trap 'stopped=1; signalled=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
for ((attempt = 0; attempt <= ${MAX_RESTARTS:-20}; attempt++)); do
  "${command[@]}" &
  child=$!
  while true; do
    status=0
    wait "$child" || status=$?
    # A signal ends `wait` early, while m3po is still saving.
    [[ $signalled -eq 1 ]] || break
    signalled=0
  done
  [[ $status -eq 75 && $stopped -eq 0 ]] || exit "$status"
  echo "stopped with everything saved; starting again"
done
exit 75
