"""Run by `test_training_mesh.py` with 8 simulated devices: the same stage on one device, 8, and 2 × 2 × 2.

The mixed run starts with data = 8, continues from its checkpoint on 2 × 2 × 2 and from that one's on one device.
Writes one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from training_tools import base_config, tiny_model, tiny_pairs

from m3po_jax.config import MeshConfig
from m3po_jax.errors import Interrupted
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.training.loop import TrainResult, train


def main(folder: Path) -> None:
    assert jax.device_count() == 8
    # Adam divides a gradient by its size: with the usual ε the rounding of a tiny gradient, which differs between
    # processors, would move its parameter by the whole learning rate, and hide mistakes of that size.
    config = base_config(batch_size=8, max_steps=5, learning_rate=1e-3, adam_epsilon=1e-3, chosen_nll_weight=0.3)
    config = replace(config, lora=replace(config.lora, train_projector=True))
    meshes = {
        "one": make_mesh(MeshConfig(), jax.devices()[:1]),
        "data": make_mesh(MeshConfig(data=8)),
        "cube": make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
    }

    def run(mesh: str, name: str, stop_at: int = 0) -> TrainResult:
        def on_step(step: int, metrics: dict[str, float]) -> None:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(
            tiny_model(config),
            tiny_pairs(config),
            config,
            output_dir=folder / name,
            mesh=meshes[mesh],
            on_step=on_step,
        )

    def numbers(result: TrainResult) -> dict[str, Any]:
        flat = nnx.to_flat_state(nnx.state(result.model))
        leaves = {".".join(map(str, path)): np.asarray(value[...]).ravel().tolist() for path, value in flat}
        return {"leaves": leaves, "metrics": result.metrics_path.read_text().splitlines()}

    results = {"one": numbers(run("one", "one"))}
    # The numbers of the first step are read at once, those of a later one while the next step is under way.
    with pytest.raises(Interrupted, match="after step 1 of 5"):
        run("data", "mixed", stop_at=1)
    with pytest.raises(Interrupted, match="after step 4 of 5"):
        run("cube", "mixed", stop_at=3)
    results["mixed"] = numbers(run("one", "mixed"))
    whole = run("data", "data")
    results["data"] = numbers(whole)
    kernel = run("cube", "mixed").model.decoder.layers.mlp.up_proj
    results["shards"] = {
        "kernel": kernel.kernel[...].addressable_shards[0].data.size / kernel.kernel[...].size,
        "lora_a": kernel.lora_a[...].addressable_shards[0].data.size / kernel.lora_a[...].size,
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
