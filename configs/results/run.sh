#!/usr/bin/env bash
# The experiment of docs/results.md on composed scenes: a base model for every seed, then `m3po compare`.
# Whatever is finished is skipped, so the same command continues a stopped one.
#
#   configs/results/run.sh systematic|diffuse [SEEDS [OUTPUT_DIR]]     e.g. run.sh systematic "0 1 2 3 4"
#
# Hardware: one CPU core, under 2 GiB, no network. More overrides: M3PO_OVERRIDES="compare.efficiency=[0.25,1]".
set -euo pipefail
regime="${1:?systematic or diffuse}"
seeds="${2:-0 1 2 3 4}"
out="${3:-runs/results}"
cd "$(dirname "$0")/../.."
rows="[{source: tfds, path: 'm3po_jax.quickstart.builder:m3po_scenes/$regime-{seed}', split: sft}]"
for seed in $seeds; do
  name=$regime-$seed
  base=(--config configs/results/base.yaml output_dir="$out/bases" name="$name" seed="$seed"
    "train.data=${rows//\{seed\}/$seed}")
  if [ ! -e "$out/bases/$name/model/config.json" ]; then
    m3po train "${base[@]}"
    m3po export "${base[@]}" --output "$out/bases/$name/model" --dtype float32
  fi
done
read -ra more <<<"${M3PO_OVERRIDES:-}"
m3po compare --config configs/results/scenes.yaml name="$regime" output_dir="$out" \
  "compare.seeds=[${seeds// /,}]" "compare.per_seed={model.path: '$out/bases/$regime-{seed}/model'}" \
  "arms.sft={train.data: $rows}" "${more[@]}"
