#!/usr/bin/env bash
# Makes the quickstart's checkpoints again with the project's own verbs and puts them into the package.
# Hardware: 2 CPU cores. Usage: configs/quickstart/rebuild.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-runs}"
target=m3po_jax/quickstart/checkpoints
for step in tower scorer base; do
  m3po train --config "configs/quickstart/$step.yaml" output_dir="$out"
  m3po export --config "configs/quickstart/$step.yaml" output_dir="$out" --output "$target/quickstart-$step" --dtype float16 --overwrite
done
