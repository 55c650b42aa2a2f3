"""Run by test_tpu_programs.py: compiles for absent TPUs and prints one JSON line a program.

A process of its own, because libtpu reads its settings once, when it is loaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m3po_jax.config import LoRAConfig, MeshConfig, Recipe, TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.hosts.sharding import describe as describe_on
from m3po_jax.hosts.sharding import make_mesh, sharding_for, state_shardings, use_mesh
from m3po_jax.models import lora
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.kernels.choice import decode_kernel, self_attention, with_attention
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import build
from m3po_jax.models.registry import describe
from m3po_jax.models.vit import ViTConfig
from m3po_jax.plan import Planner, topology_devices
from m3po_jax.training.step import make_step, split_model

LAYERS = 2
LLAVA_7B = LlavaConfig(
    text=DecoderConfig(32064, 4096, 11008, num_layers=LAYERS, num_heads=32, num_kv_heads=32, head_dim=128),
    vision=ViTConfig(
        "clip", EncoderConfig(1024, 4096, num_layers=LAYERS, num_heads=16), image_size=336, patch_size=14
    ),
    image_token_id=32000,
)
PROMPT, ANSWER = 640, 256


def report(name: str, compiled: Any) -> None:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(
        json.dumps(
            {
                "program": name,
                "kernels": text.count('custom_call_target="tpu_custom_call"'),
                "temp_mb": memory.temp_size_in_bytes / 1e6,
                "argument_mb": memory.argument_size_in_bytes / 1e6,
                "scores": text.count(f"{PROMPT},{PROMPT}]"),
                "all_gathers": text.count(" all-gather("),
            }
        ),
        flush=True,
    )


def placed(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...], mesh: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_for(axes, shape, mesh))


def prefix_kernels(mesh: Any) -> None:
    """Both directions of the prefix's self-attention, and the grouped decode kernel, on every device's share."""
    rows, heads = ("batch", None, "heads", None), ("batch", "kv_heads", None, None)
    for dtype in (jnp.bfloat16, jnp.float32):
        for kv_heads, width, tokens in ((32, 128, 640), (8, 64, 577)):
            q = placed((16, tokens, 32, width), dtype, rows, mesh)
            k = placed((16, tokens, kv_heads, width), dtype, rows, mesh)
            mask = placed((16, tokens), jnp.bool_, ("batch", None), mesh)

            def loss(q: Any, k: Any, v: Any, mask: Any) -> Any:
                return self_attention(q, k, v, mask, causal=True, kind="pallas").astype(jnp.float32).sum()

            with use_mesh(mesh):
                report("self_attention", jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, mask).compile())
            for candidates, prefix in ((1, 640), (8, 648), (16, 1536)):
                q = placed((16, kv_heads, candidates * 32 // kv_heads, width), dtype, heads, mesh)
                k = placed((16, kv_heads, prefix, width), dtype, heads, mesh)
                length = placed((16,), jnp.int32, ("batch",), mesh)
                with use_mesh(mesh):
                    lowered = jax.jit(decode_kernel("pallas")).lower(q, k, k, length)
                    report(f"prefix_attention_{width}", lowered.compile())


def preference_step(mesh: Any, attention: str, pairs: int = 16) -> None:
    """A LoRA-DPO step of LLaVA-1.5-7B's widths."""
    config = TrainConfig(batch_size=pairs, lora=LoRAConfig(), reference="recorded")
    kept = {}

    def make() -> Any:
        model = build(with_attention(LLAVA_7B, attention), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        lora.attach(model, config.lora, scope="decoder", rngs=nnx.Rngs(0))
        kept["partition"], trainable, frozen = split_model(model, config)
        return trainable, frozen

    trainable, frozen = jax.eval_shape(make)
    step = make_step(kept["partition"], trainable, config, total_steps=10, mesh=mesh, remat="full")
    state = step.describe(trainable)
    frozen = describe_on(frozen, state_shardings(frozen, mesh))
    rows = lambda shape, dtype: placed(shape, dtype, ("batch", *(None,) * (len(shape) - 1)), mesh)  # noqa: E731
    batch = TreeBatch(
        rows((pairs, PROMPT), jnp.int32),
        rows((pairs, PROMPT), jnp.bool_),
        {"pixels": rows((pairs, 1, 336, 336, 3), jnp.float32)},
        rows((pairs, 2, ANSWER), jnp.int32),
        rows((pairs, 2, ANSWER), jnp.bool_),
        rows((pairs, 2), jnp.float32),
        rows((pairs,), jnp.int32),
    )
    with use_mesh(mesh):
        report(f"preference_step_{attention}", step.jitted.lower(state, frozen, None, batch).compile())


def generation(mesh: Any, folder: Path) -> None:
    """Prefill and decoding at LLaVA-1.5-7B's widths: 16 prompts, 8 candidates of 257 tokens."""
    text, vision = LLAVA_7B.text, LLAVA_7B.vision.encoder
    sizes = {"hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size}
    config = {
        "model_type": "llava",
        "image_token_index": LLAVA_7B.image_token_id,
        "text_config": {
            "model_type": "llama", **sizes, "vocab_size": text.vocab_size, "num_hidden_layers": LAYERS,
            "num_attention_heads": text.num_heads, "num_key_value_heads": text.num_kv_heads,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": vision.hidden_size, "image_size": 336, "patch_size": 14,
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": LAYERS,
            "num_attention_heads": vision.num_heads,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    recipe = Recipe()
    recipe.model.path = str(folder)
    recipe.generate.batch_size, recipe.generate.max_new_tokens = 16, 257
    for program in Planner(recipe, describe(folder), mesh, PROMPT, None).generation():
        print(
            json.dumps(
                {
                    "program": program.name,
                    "temp_mb": program.temporaries / 1e6,
                    "argument_mb": program.arguments / 1e6,
                }
            ),
            flush=True,
        )


def main(name: str, *programs: str) -> None:
    devices = topology_devices(name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices) // 2, tensor=2), devices)
    if "generation" in programs:
        with tempfile.TemporaryDirectory() as folder:
            generation(make_mesh(MeshConfig(data=1, fsdp=-1), devices), Path(folder))
    if "kernels" in programs:
        prefix_kernels(mesh)
    for attention in ("xla", "pallas"):
        if f"step_{attention}" in programs:
            preference_step(mesh, attention)


main(*sys.argv[1:])
