#!/usr/bin/env bash
# The experiment of docs/results.md on NLVR v1: rows from a folder that holds the corpus, a base model for every seed, then
# `m3po compare`. Whatever is finished is skipped, so the same command continues a stopped one.
#
#   configs/results/nlvr.sh NLVR_FOLDER [SEEDS [OUTPUT_DIR]]     e.g. nlvr.sh ~/nlvr "0 1 2 3 4"
#
# Hardware: one CPU core, under 2 GiB, no network.
set -euo pipefail
corpus="$(realpath "${1:?the folder that holds dev.jsonl and test.jsonl}")"
seeds="${2:-0 1 2 3 4}"
out="${3:-runs/results}"
cd "$(dirname "$0")/../.."
data="$out/nlvr-data"
python -m m3po_jax.quickstart.nlvr "$corpus" "$data" configs/quickstart/base
for seed in $seeds; do
  base=(--config configs/results/nlvr_base.yaml output_dir="$out/bases" name="nlvr-$seed" seed="$seed"
    model.path="$data/model" "train.data=[{source: jsonl, path: '$data/sft.jsonl'}]")
  if [ ! -e "$out/bases/nlvr-$seed/model/config.json" ]; then
    m3po train "${base[@]}"
    m3po export "${base[@]}" --output "$out/bases/nlvr-$seed/model" --dtype float32
  fi
done
m3po compare --config configs/results/nlvr.yaml output_dir="$out" data.path="$data/prompts.jsonl" \
  "evaluate.benchmarks.nlvr.data.path=$data/test.jsonl" "compare.seeds=[${seeds// /,}]" \
  "arms.sft={train.data: [{source: jsonl, path: '$data/sft.jsonl'}]}" \
  "compare.per_seed={model.path: '$out/bases/nlvr-{seed}/model'}"
