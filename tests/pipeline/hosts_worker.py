"""Run by `test_hosts.py` as each of two processes with two devices: what each reads, and how both stop.

Writes one JSON object per process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from training_tools import TinyProcessor, base_config, pair_rows, tiny_model

from m3po_jax.config import MeshConfig
from m3po_jax.data import tables
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.sources import read_prompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import own_rows, shared_out
from m3po_jax.hosts.sharding import make_mesh, sharding_for
from m3po_jax.hosts.startup import initialize_distributed
from m3po_jax.inference.settings import sampling_config
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.caches import vision_features
from m3po_jax.pipeline.generate import generate
from m3po_jax.pipeline.models import InputLimits, load_policy, make_generator
from m3po_jax.recipes import load_recipe
from m3po_jax.training.loop import train
from m3po_jax.workspace.shards import ShardFolder

reads: list[str] = []


def counted(real: Callable[[Any, Prompt], Any]) -> Callable[[Any, Prompt], Any]:
    def images(self: Any, prompt: Prompt) -> Any:
        reads.append(prompt.id)
        return real(self, prompt)

    return images


class OneIsDamaged(TinyProcessor):
    def pixel_values(self, prompt: Prompt) -> np.ndarray:
        reads.append(prompt.id)
        if prompt.id == "row-5":
            raise UserError("a damaged image", where="row-5")
        return super().pixel_values(prompt)


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    reads.clear()
    found: dict[str, Any] = {"error": None}
    try:
        work()
    except UserError as error:
        found["error"] = str(error)
    return found | {"reads": sorted(reads)}


def check_own_rows() -> None:
    """jax puts on this process's devices the rows that we say it does."""
    for data, fsdp, tensor, count in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 4, 6, 8)):
        if data * fsdp * tensor == jax.device_count():
            mesh = make_mesh(MeshConfig(data, fsdp, tensor))
            mask = np.zeros(count, bool)
            for index in sharding_for(("batch",), (count,), mesh).addressable_devices_indices_map((count,)).values():
                mask[index] = True
            np.testing.assert_array_equal(own_rows(count, mesh), mask)


def main(folder: Path) -> None:
    initialize_distributed()
    assert jax.device_count() == 4 and jax.process_count() == 2
    check_own_rows()
    Processor.images = counted(Processor.images)  # type: ignore[method-assign]
    recipe = load_recipe(folder / "mini.yaml")
    source = read_prompts(recipe.data)
    prompts = [prompt for prompt in source if prompt.metadata["kind"] == "caption"]
    mesh = make_mesh(MeshConfig())
    policy = load_policy(recipe.model, recipe.seed, mesh, InputLimits(), image_root=source.image_root)
    processor = policy.processor
    config = dataclasses.replace(recipe.generate, num_candidates=2, max_new_tokens=8)
    generator = make_generator(
        processor, policy.model, mesh, sampling=sampling_config(config, 7), batch_size=config.batch_size
    )

    def generated(name: str, bad: int | None = None, features: Any = None) -> dict[str, Any]:
        rows = list(prompts)
        if bad is not None:
            rows[bad] = dataclasses.replace(rows[bad], images=(Image(path="broken.png"),))
        out = folder / name
        shards = ShardFolder(out, "m3po generate")
        found = outcome(lambda: generate(rows, generator, processor, config, shards, inputs="x", features=features))
        made = sorted(tables.read_rows(out), key=lambda row: (row["id"], row["candidate"])) if out.exists() else []
        return found | {"made": [[row["id"], row["candidate"], row["token_ids"]] for row in made]}

    def cached(name: str) -> Any:
        return vision_features(folder / name, policy, processor, mesh)

    results = {"pixels": generated("pixels"), "bad_12": generated("bad_12", 12), "bad_13": generated("bad_13", 13)}
    one = cached("one")
    results["uncached_3"] = generated("uncached_3", 3, one)
    results["uncached_12"] = generated("uncached_12", 12, one)
    results["cached"] = generated("cached", features=cached("other"))

    learning = base_config(max_steps=6, save_steps=100)
    pairs = pair_batches(pair_rows(7), OneIsDamaged(), batch_size=4, seed=3, own_rows=shared_out(mesh))
    results["train"] = outcome(
        lambda: train(tiny_model(learning), pairs, learning, output_dir=folder / "train", mesh=mesh)
    )
    (folder / f"results-{jax.process_index()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
