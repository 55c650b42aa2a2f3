"""Cached vision features and reference log-probs give what computing them gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from training_tools import TinyProcessor, base_config, pair_rows, tiny_model, tiny_pairs

from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.feature_cache import FeatureCache, PromptFeatures
from m3po_jax.data.model_images import ProcessedImage, joined, stacked
from m3po_jax.errors import UserError
from m3po_jax.objectives.registry import check_objective
from m3po_jax.training.loop import train
from m3po_jax.training.reference import ReferenceCache, check_sample, sums_program, with_cached_reference
from m3po_jax.workspace.metrics_log import read_metrics


def features_of(model: Any, folder: Path) -> tuple[PromptFeatures, list[int]]:
    """The model's features in a cache, and the sizes of the batches that were encoded."""
    processor, encoded = TinyProcessor(), []
    program = jax.jit(model.encode_images)

    def encode(images: Sequence[ProcessedImage]) -> list[np.ndarray]:
        encoded.append(len(images))
        return [np.asarray(program(stacked([joined([image])])))[0] for image in images]

    cache = FeatureCache(folder, "tower", width=16, dtype=np.float32)
    made = PromptFeatures(
        cache,
        image_keys=processor.image_keys,
        plans=processor.image_plans,
        images=processor.images,
        encode=encode,
    )
    return made, encoded


def mixed_rows() -> list[dict[str, Any]]:
    """Text-only rows, rows with one and with two images."""
    two, one = pair_rows(7, images=2), pair_rows(7)
    return [{**row, "images": row["images"][: i % 3]} if i % 3 else one[i] for i, row in enumerate(two)][:5] + [
        {**row, "images": []} for row in two[5:]
    ]


def pairs(config: Any, features: PromptFeatures | None = None) -> BatchSource:
    return pair_batches(mixed_rows(), TinyProcessor(), batch_size=config.batch_size, seed=3, features=features)


def test_training_on_cached_features(tmp_path: Path, one_device: Mesh) -> None:
    """Same metrics within 1e-5 with mDPO's blank term and blanked accuracies, mixed rows, accumulation; the tower
    runs once for each image, in a second run not at all."""
    config = base_config(
        conditional_weight=1.0, harm_metrics_steps=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-3
    )
    features, encoded = features_of(tiny_model(config), tmp_path / "cache")
    lines = {}
    for name, given in (("pixels", None), ("cached", features)):
        folder = tmp_path / name
        train(tiny_model(config), pairs(config, given), config, output_dir=folder, mesh=one_device)
        lines[name] = read_metrics(folder / "metrics.jsonl")
    images = {image["path"] for row in mixed_rows() for image in row["images"]}
    assert features.cache.size()[0] == len(images) and sum(encoded) >= len(images)
    for line, other in zip(lines["cached"], lines["pixels"], strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if key == "rewards/conditional_accuracies" or (line["step"] == 1 and "accuracies" in key):
                continue  # ties (a row without image has nothing to corrupt), decided by rounding
            np.testing.assert_allclose(value, other[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert "rewards/accuracies_blank" in lines["cached"][1]
    before = sum(encoded)
    batch = next(iter(pairs(config, features)))
    assert batch.images.keys() == {"tokens", "features"} and batch.images["features"].shape[1:] == (8, 16)
    assert sum(encoded) == before


def test_features_are_refused_where_the_tower_learns() -> None:
    config = base_config(conditional_weight=1.0)
    adapted = replace(config, lora=replace(config.lora, target_modules=["q_proj", "vision_tower.q_proj"]))
    with pytest.raises(UserError, match="need a frozen vision tower"):
        check_objective(adapted)


def test_cached_reference_is_the_computed_one(tmp_path: Path, one_device: Mesh) -> None:
    config = base_config(max_steps=2, learning_rate=1e-3)
    model = tiny_model(config)
    source = tiny_pairs(config)
    cache = ReferenceCache(tmp_path / "reference", "model")
    filled, computed = with_cached_reference(source, model, one_device, cache, rows_at_once=4)
    assert computed == 7 and filled.has_reference and not source.has_reference
    again, computed = with_cached_reference(source, model, one_device, cache, rows_at_once=4)
    assert computed == 0 and cache.size() > 0
    for given in (filled, again):
        np.testing.assert_array_equal(given.dataset[0].reference, filled.dataset[0].reference)
    lines = []
    recorded = replace(config, reference="recorded")
    for name, given, settings in (("step", source, config), ("cache", filled, recorded)):
        train(model, given, settings, output_dir=tmp_path / name, mesh=one_device)
        lines.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    for line, other in zip(*lines, strict=True):
        for key in line:
            if line["step"] > 1 or key != "rewards/accuracies":
                np.testing.assert_allclose(line[key], other[key], rtol=1e-3, atol=2e-5, err_msg=key)
    # Another model or another answer is another key; a damaged shard is made again.
    assert with_cached_reference(source, model, one_device, ReferenceCache(tmp_path, "b"), rows_at_once=4)[1] == 7
    rows = pair_rows(7)
    rows[2] = {**rows[2], "chosen": rows[3]["chosen"]}
    changed = pair_batches(rows, TinyProcessor(), batch_size=4, seed=3)
    assert with_cached_reference(changed, model, one_device, cache, rows_at_once=4)[1] == 1
    for shard in (tmp_path / "reference" / "model").glob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-9])
    assert with_cached_reference(source, model, one_device, cache, rows_at_once=4)[1] == 7


def test_the_sample_of_recorded_rows(tmp_path: Path, one_device: Mesh) -> None:
    """The reference's own log-probs pass, also where it is not the base; one row of another model's is named."""
    config = base_config(reference="recorded")
    model = tiny_model(config)
    for _, linear in nnx.iter_modules(model):
        if getattr(linear, "lora_b", None) is not None:
            linear.lora_b[...] = linear.lora_b[...] + 0.1
    program, source = sums_program(model, one_device), pairs(config)
    assert source.take is not None
    sums = {i: program(source.take([i, i]))[0] for i in range(7)}

    def rows(shift: float) -> list[dict[str, Any]]:
        found = []
        for i, row in enumerate(mixed_rows()):
            tokens = {
                side: TinyProcessor().encode_answer(row[side][0]["content"][0]["text"])
                for side in ("chosen", "rejected")
            }
            record = {f"{side}_token_ids": ids for side, ids in tokens.items()}
            for k, (side, ids) in enumerate(tokens.items()):
                mean = sums[i][k] / len(ids) + (shift if i == 6 and k == 1 else 0.0)
                record[f"reference_{side}_logprobs"] = [float(mean)] * len(ids)
            found.append({**row, **record})
        return found

    good = pair_batches(rows(0.0), TinyProcessor(), batch_size=4, seed=3)
    check_sample(model, good, one_device, 4, 1e-3)
    result = train(model, good, replace(config, max_steps=1), output_dir=tmp_path, mesh=one_device)
    assert result.metrics["loss/preference"] == pytest.approx(np.log(2), abs=1e-3)
    bad = pair_batches(rows(0.01), TinyProcessor(), batch_size=4, seed=3)
    with pytest.raises(UserError, match=r"row 'row-6'.*rejected answer.*0\.0100 nats per token apart"):
        check_sample(model, bad, one_device, 4, 1e-3)
