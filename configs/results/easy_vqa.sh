#!/usr/bin/env bash
# The experiment of docs/results.md on easy-VQA: a base model for every seed, then `m3po compare`. Whatever is finished is
# skipped, so the same command continues a stopped one. Hardware: one CPU core, under 2 GiB, no network.
#
#   configs/results/easy_vqa.sh [SEEDS [OUTPUT_DIR]]     e.g. easy_vqa.sh "0 1 2 3 4"
set -euo pipefail
seeds="${1:-0 1 2 3 4}"
out="${2:-runs/results}"
cd "$(dirname "$0")/../.."
for seed in $seeds; do
  base=(--config configs/results/easy_vqa_base.yaml output_dir="$out/bases" name="easy-vqa-$seed" seed="$seed")
  if [ ! -e "$out/bases/easy-vqa-$seed/model/config.json" ]; then
    m3po train "${base[@]}"
    m3po export "${base[@]}" --output "$out/bases/easy-vqa-$seed/model" --dtype float32
  fi
done
m3po compare --config configs/results/easy_vqa.yaml output_dir="$out" "compare.seeds=[${seeds// /,}]" \
  "compare.per_seed={model.path: '$out/bases/easy-vqa-{seed}/model'}"
