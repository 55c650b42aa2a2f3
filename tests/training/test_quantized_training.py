"""LoRA on an 8-bit base through the training loop: the codes stay, the adapters learn, scale 0 is the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from training_tools import base_config, tiny_model, tiny_pairs

from m3po_jax.models import lora
from m3po_jax.models.layers import LoRAParam
from m3po_jax.models.quantized_base import quantize_base
from m3po_jax.training.flops import step_cost
from m3po_jax.training.loop import train


def everything(model: Any) -> dict[str, tuple[bool, np.ndarray]]:
    """Every variable: whether it belongs to an adapter, and its value."""
    return {
        ".".join(map(str, path)): (isinstance(v, LoRAParam), np.asarray(v[...]))
        for path, v in nnx.to_flat_state(nnx.state(model))
    }


def test_dpo_learns_on_codes(tmp_path: Path, one_device: Any) -> None:
    config = base_config(save_steps=3)
    model = tiny_model(config)
    quantize_base(model, "int8", scope="decoder")
    assert step_cost(model, set()) == step_cost(tiny_model(config), set())  # the arithmetic of a step stays the same
    before = everything(model)
    result = train(model, tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device, remat="full")
    after = everything(result.model)
    assert before.keys() == after.keys() and sum(v.dtype == np.int8 for _, v in after.values()) == 7
    changed = {name for name, (_, value) in before.items() if not np.array_equal(value, after[name][1])}
    assert changed == {name for name, (adapter, _) in before.items() if adapter}
    lines = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # The reference is the same codes without the adapter, so the first loss is that of equal policies.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert all(linear.kernel_scale is not None for linear in lora.adapters(result.model).values())
