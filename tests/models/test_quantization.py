"""Frozen weights in 8 and 4 bits: codes, products, streaming, sharding, training, generation and export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import encoded

from m3po_jax.config import LoRAConfig, Recipe, TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter
from m3po_jax.models.forward import reference_forward
from m3po_jax.models.quantization import BLOCK, NF4, Codes, Quantized, dequantize, product, quantize
from m3po_jax.models.registry import Loaded, load_model
from m3po_jax.pipeline.models import check_trainable
from m3po_jax.training.step import split_model

KINDS = ("int8", "nf4")
# Inputs that are whole blocks of 64, so that both kinds apply to every layer.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2}


def test_the_codebook_is_bitsandbytes_own() -> None:
    """Its `create_normal_map`: quantiles of the normal distribution at an offset, a zero between the two halves."""
    norm = pytest.importorskip("scipy.stats").norm
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-7)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), power=st.integers(-12, 12), kind=st.sampled_from(KINDS))
def test_an_element_is_off_by_half_a_step_at_most(seed: int, power: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(3, (2 * BLOCK, 3)) * 10.0**power).astype(np.float32)
    w[:, 1] = 0
    codes = quantize(jnp.asarray(w), kind)
    back = np.asarray(dequantize(codes, jnp.float32))
    if kind == "int8":
        top = np.abs(w).max(0)
        assert np.all(np.abs(back - w) <= top * (0.5 / 127 + 1e-6))
    else:
        top = np.repeat(np.abs(w).reshape(2, BLOCK, 3).max(1), BLOCK, axis=0)
        steps = np.abs(w / np.where(top == 0, 1, top) - np.asarray(NF4)[:, None, None])
        np.testing.assert_allclose(np.abs(back - w), steps.min(0) * top, atol=1e-6 * top.max())
    assert np.all(back[:, 1] == 0)
    # A channel's greatest value survives, and values that have a code are exact.
    np.testing.assert_allclose(np.abs(back).max(0), np.abs(w).max(0), rtol=1e-6)
    np.testing.assert_allclose(dequantize(quantize(jnp.asarray(back), kind), jnp.float32), back, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_codes_is_that_with_the_kernel_they_stand_for(kind: str) -> None:
    """Values and the gradient, for a layer's product and for one with several output axes."""
    rng = np.random.default_rng(0)
    codes = quantize(jnp.asarray(rng.normal(size=(BLOCK, 12)), jnp.float32), kind)
    fused = Codes(*(x.reshape(*x.shape[:-1], 3, 4) for x in codes))
    x = jnp.asarray(rng.normal(size=(2, 5, BLOCK)), jnp.float32)
    for equation, weight in (("...i,io->...o", codes), ("bse,egd->bsgd", fused)):
        kernel = dequantize(weight, jnp.float32)
        ours = lambda x, e=equation, w=weight: jnp.sin(product(e, x, w, precision="highest")).sum()  # noqa: E731
        plain = lambda x, e=equation, k=kernel: jnp.sin(jnp.einsum(e, x, k, precision="highest")).sum()  # noqa: E731
        (a, da), (b, db) = (jax.value_and_grad(f)(x) for f in (ours, plain))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_allclose(da, db, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_keeps_codes_and_no_kernel(kind: str) -> None:
    codes = quantize(jnp.ones((BLOCK, 32)), kind)
    x = jnp.ones((2, BLOCK))
    _, pull = jax.vjp(lambda x: product("...i,io->...o", x, codes, precision=None), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]
    assert kept and all(leaf.size < BLOCK * 32 or leaf.dtype in (jnp.int8, jnp.uint8) for leaf in kept)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return hf_models.llava(seed=3, text=SIZES)


@pytest.fixture(scope="module")
def directory(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    theirs.save_pretrained(path)
    return path


def load(directory: Path, kind: str, **kwargs: Any) -> Loaded:
    return load_model(directory, dtype="float32", param_dtype="float32", quantization=kind, **kwargs)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    ids = rng.integers(1, 50, (2, 12)).astype(np.int32)
    ids[:, 1 : 1 + hf_models.PATCHES] = hf_models.IMAGE
    return ids, np.ones_like(ids), hf_models.images(2)


@nnx.jit
def logits(model: Any, ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> jax.Array:
    features = encoded(model, pixels[:, None])
    return reference_forward(model, ids, mask, features)


def our_logits(model: Any) -> np.ndarray:
    ids, mask, pixels = inputs()
    return np.asarray(logits(model, ids, mask, pixels.transpose(0, 2, 3, 1)))


def their_logits(model: Any) -> np.ndarray:
    torch, _ = hf_models.torch_and_transformers()
    ids, mask, pixels = (torch.from_numpy(x) for x in inputs())
    with torch.no_grad():
        return model(input_ids=ids.long(), attention_mask=mask.long(), pixel_values=pixels).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_with_the_dequantised_weights(kind: str, theirs: Any, directory: Path) -> None:
    original = {name: value.clone() for name, value in theirs.state_dict().items()}
    try:
        assert hf_models.quantise(theirs, kind) == 14
        expected = their_logits(theirs)
    finally:
        theirs.load_state_dict(original)
    actual = our_logits(load(directory, kind).model)
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    off = np.abs(expected - their_logits(theirs)).max()
    assert off > (0.003 if kind == "int8" else 0.05)  # the comparison would notice weights left as they were


def parameter_bytes(model: Any) -> int:
    leaves = jax.tree.leaves(nnx.state(model.decoder.layers))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_memory_and_the_layers_that_are_quantised(directory: Path) -> None:
    plain = load_model(directory, dtype="float32", param_dtype="bfloat16").model
    sizes = {kind: load(directory, kind).model for kind in KINDS}
    kernels = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(plain.decoder.layers)) if leaf.ndim == 3)
    for kind, bits in (("int8", 8), ("nf4", 4)):
        codes = [v for _, v in nnx.to_flat_state(nnx.state(sizes[kind], Quantized))]
        assert len(codes) == 2 * 7
        assert sum(v[...].size for v in codes if v.dtype != jnp.float32) * 8 == kernels * bits
        # Scales: 4 bytes for every 64 inputs, or for every output channel.
        scales = sum(v[...].size for v in codes if v.dtype == jnp.float32)
        assert scales <= kernels // 64
        assert isinstance(sizes[kind].decoder.lm_head.kernel, nnx.Param)
        assert isinstance(sizes[kind].vision_tower.encoder.layers.mlp.fc1.kernel, nnx.Param)
        # Nothing that trains by itself: full fine-tuning would find no kernel here.
        assert not [
            p for p, _ in nnx.to_flat_state(nnx.state(sizes[kind].decoder.layers, nnx.Param)) if "kernel" in p
        ]
    assert parameter_bytes(sizes["int8"]) < 0.55 * parameter_bytes(plain)
    assert parameter_bytes(sizes["nf4"]) < 0.32 * parameter_bytes(plain)


def adapt(model: Any, rank: int = 2) -> LoRAConfig:
    config = LoRAConfig(lora_rank=rank, lora_alpha=2.0 * rank)
    lora.attach(model, config, scope="decoder", rngs=nnx.Rngs(0))
    for index, linear in enumerate(lora.adapters(model).values()):
        linear.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(index), linear.lora_b.shape)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_train_and_scale_zero_is_the_reference(kind: str, directory: Path) -> None:
    model = load(directory, kind).model
    base = our_logits(model)
    config = TrainConfig(lora=adapt(model))
    partition, trainable, frozen = split_model(model, config)
    assert all(name.endswith(("lora_a", "lora_b")) for name in trainable) and len(trainable) == 14
    assert all(value.dtype == jnp.float32 for value in trainable.values())
    ids, mask, pixels = inputs()

    @jax.jit
    def gradients(trainable: Any, frozen: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            model = partition.merge(trainable, frozen)
            features = encoded(model, pixels.transpose(0, 2, 3, 1)[:, None])
            return jnp.sum(jnp.sin(reference_forward(model, ids, mask, features)))

        return jax.grad(loss)(trainable)

    assert all(float(jnp.abs(g).max()) > 1e-3 for g in gradients(trainable, frozen).values())
    assert np.abs(our_logits(model) - base).max() > 1e-2
    lora.set_scale(model, 0.0)
    np.testing.assert_array_equal(our_logits(model), base)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_merge_into_the_original_weights(kind: str, directory: Path, tmp_path: Path) -> None:
    _, transformers = hf_models.torch_and_transformers()
    quantised, exact = load(directory, kind), load(directory, "none")
    config = adapt(quantised.model)
    adapt(exact.model)
    out = export_model(quantised.model, quantised, tmp_path / "merged", dtype="float32")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    np.testing.assert_allclose(their_logits(merged), our_logits(exact.model), atol=1e-4)
    # The adapter alone goes out and comes back onto the codes that it was trained on.
    export_adapter(quantised.model, str(directory), tmp_path / "adapter", config)
    again = load(directory, kind).model
    load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(again), our_logits(quantised.model), atol=1e-5)


def test_what_cannot_be_done_with_codes_is_refused(directory: Path, tmp_path: Path) -> None:
    drawn = load(directory, "int8", init="random")
    adapt(drawn.model)
    with pytest.raises(UserError, match="drawn at random") as caught:
        export_model(drawn.model, drawn, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "--format peft" in str(caught.value)
    with pytest.raises(UserError, match="cannot be merged"):
        lora.merge(drawn.model)
    with pytest.raises(UserError, match="did you mean"):
        load(directory, "int4")
    recipe = Recipe()
    recipe.model.quantization = "nf4"
    check_trainable(recipe.model.quantization, recipe.train.lora)
    recipe.train.lora.lora_rank = 0
    with pytest.raises(UserError, match="would train them"):
        check_trainable(recipe.model.quantization, recipe.train.lora)


def test_layers_whose_inputs_are_no_whole_blocks_stay_as_they_are(tmp_path: Path) -> None:
    """Half of this model's layers have 48 inputs; int8 takes them, nf4 leaves them."""
    hf_models.llava(text={**SIZES, "intermediate_size": 48}).save_pretrained(tmp_path)
    kinds = {kind: load(tmp_path, kind).model.decoder.layers.mlp for kind in KINDS}
    assert kinds["int8"].down_proj.kernel_scale is not None
    assert kinds["nf4"].down_proj.kernel_scale is None and kinds["nf4"].up_proj.kernel_scale is not None
    assert np.all(np.isfinite(our_logits(load(tmp_path, "nf4").model)))


def test_eight_devices_hold_the_codes_that_one_does(directory: Path) -> None:
    worker = Path(__file__).with_name("mesh_quantization.py")
    env = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, str(worker), str(directory)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
