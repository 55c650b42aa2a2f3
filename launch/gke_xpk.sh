#!/usr/bin/env bash
# Submits a recipe as a workload of a GKE cluster through xpk.
#
#   CLUSTER=my-cluster TPU_TYPE=v6e-16 DOCKER_IMAGE=REGISTRY/m3po:TAG \
#     launch/gke_xpk.sh [--dry-run] configs/RECIPE.yaml [key=value ...]
#
# The image holds the installed package and the repository in its working directory. The cluster restarts a workload
# that was stopped (exit status 75), MAX_RESTARTS times (20) at most; it continues where it was, so output_dir in the
# recipe must be a folder that outlives the containers. A workload of this name that exists is left alone.
#
# Also read from the environment: WORKLOAD (default: the recipe's file name), NUM_SLICES (1), PROJECT and ZONE (default:
# xpk's), M3PO_VERB (run).
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then dry_run=1; shift; fi
[[ $# -ge 1 && "$1" != -* ]] || usage
for name in CLUSTER TPU_TYPE DOCKER_IMAGE; do
  [[ -n "${!name:-}" ]] || { echo "gke_xpk.sh: set $name" >&2; usage; }
done
recipe=$1
shift
workload=${WORKLOAD:-$(basename "$recipe" .yaml)}
workload=${workload//[^a-zA-Z0-9]/-} # Kubernetes' alphabet
workload=${workload,,}

at=(--cluster "$CLUSTER")
[[ -z "${PROJECT:-}" ]] || at+=(--project "$PROJECT")
[[ -z "${ZONE:-}" ]] || at+=(--zone "$ZONE")

step() {
  printf '+' && printf ' %q' "$@" && printf '\n'
  [[ $dry_run -eq 1 ]] || "$@"
}

if [[ $dry_run -eq 0 ]] && xpk workload list "${at[@]}" --filter-by-job "^$workload\$" | grep -qw -- "$workload"; then
  echo "workload $workload exists; xpk workload delete --workload $workload removes it"
  exit 0
fi

# exec: the container's stop signal must reach m3po, not a shell.
printf -v command ' %q' "$recipe" "$@"
command="exec env M3PO_MULTI_HOST=1 m3po ${M3PO_VERB:-run} --config$command"
step xpk workload create "${at[@]}" --workload "$workload" --tpu-type "$TPU_TYPE" --num-slices "${NUM_SLICES:-1}" \
  --docker-image "$DOCKER_IMAGE" --max-restarts "${MAX_RESTARTS:-20}" --restart-on-exit-codes 75 \
  --termination-grace-period-seconds 120 --command "$command"
