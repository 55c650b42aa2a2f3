#!/usr/bin/env bash
# Runs a recipe on all hosts of a TPU slice, through a queued resource that is made if it does not exist.
#
#   TPU_NAME=m3po ZONE=us-east5-b ACCELERATOR_TYPE=v6e-16 RUNTIME_VERSION=v2-alpha-tpuv6e \
#     launch/tpu_vm.sh [--dry-run] configs/RECIPE.yaml [key=value ...]
#
# Repeat the same command after anything that went wrong: what exists is used, what is finished is skipped. A run that
# was stopped (exit status 75) or whose slice was taken away is started again, MAX_RESTARTS times at most. The slice
# stays until you delete it:  gcloud compute tpus queued-resources delete NAME --zone ZONE --force
#
# Also read from the environment: PROJECT (default: gcloud's), SPOT=1 (a spot slice), M3PO_VERB (run), MAX_RESTARTS (20),
# POLL_SECONDS (30). The recipe's data and output_dir must be on storage that all hosts see, e.g. a mounted bucket.
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then dry_run=1; shift; fi
[[ $# -ge 1 && "$1" != -* ]] || usage
for name in TPU_NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION; do
  [[ -n "${!name:-}" ]] || { echo "tpu_vm.sh: set $name" >&2; usage; }
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f "$1" ]] || { echo "tpu_vm.sh: no such recipe: $1" >&2; exit 2; }
recipe=$(realpath "$1")
shift
[[ "$recipe" == "$root"/* ]] || { echo "tpu_vm.sh: the recipe must lie under $root, which is copied" >&2; exit 2; }

at=(--zone "$ZONE")
[[ -z "${PROJECT:-}" ]] || at+=(--project "$PROJECT")

step() {
  printf '+' && printf ' %q' "$@" && printf '\n'
  [[ $dry_run -eq 1 ]] || "$@"
}

state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${at[@]}" --format='value(state.state)' 2>/dev/null ||
    echo ABSENT
}

# Makes the slice where it is absent or was taken away, and waits until it can be used.
ensure_slice() {
  local create=(gcloud compute tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" "${at[@]}"
    --accelerator-type "$ACCELERATOR_TYPE" --runtime-version "$RUNTIME_VERSION")
  [[ "${SPOT:-0}" != 1 ]] || create+=(--spot)
  if [[ $dry_run -eq 1 ]]; then step "${create[@]}"; return; fi
  while true; do
    local now
    now=$(state)
    case "$now" in
      ACTIVE) return ;;
      ABSENT) step "${create[@]}" ;;
      FAILED | SUSPENDED)
        step gcloud compute tpus queued-resources delete "$TPU_NAME" "${at[@]}" --force --quiet ;;
      *) echo "$TPU_NAME: $now"; sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
}

on_all_hosts() { step gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${at[@]}" --worker=all --command "$1"; }

archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT

install() {
  # uv brings its own Python, because the images' may be too old; the commands on the hosts can be repeated.
  # shellcheck disable=SC2016 # $HOME is the host's
  local prepare='set -e; mkdir -p m3po_jax; tar -xzf m3po_jax.tgz -C m3po_jax; python3 -m pip install --quiet --user uv; export PATH=$HOME/.local/bin:$PATH; uv venv --quiet --allow-existing --python 3.12 m3po-venv; uv pip install --quiet --python m3po-venv/bin/python "./m3po_jax[tpu]"'
  step tar -C "$root" -czf "$archive/m3po_jax.tgz" --exclude=.git --exclude=./runs --exclude='.venv*' . &&
    step gcloud compute tpus tpu-vm scp "$archive/m3po_jax.tgz" "$TPU_NAME:" "${at[@]}" --worker=all &&
    on_all_hosts "$prepare"
}

arguments=$(printf ' %q' "$@")
[[ $# -gt 0 ]] || arguments=
printf -v relative '%q' "${recipe#"$root"/}"
command="cd m3po_jax && M3PO_MULTI_HOST=1 ../m3po-venv/bin/m3po ${M3PO_VERB:-run} --config $relative$arguments"

for ((attempt = 0; attempt <= ${MAX_RESTARTS:-20}; attempt++)); do
  ensure_slice
  status=0
  { install && on_all_hosts "$command"; } || status=$?
  [[ $status -ne 0 ]] || exit 0
  if [[ $status -ne 75 && "$(state)" == ACTIVE ]]; then exit "$status"; fi
  echo "stopped (status $status); starting again"
done
echo "tpu_vm.sh: gave up after ${MAX_RESTARTS:-20} restarts" >&2
exit 75
