"""The attention kernels against the XLA path: values, gradients, padding, grouped queries, types and meshes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import encoded

from m3po_jax.errors import UserError
from m3po_jax.models.attention import Bidirectional, Causal, Spans
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.forward import branch_log_probs
from m3po_jax.models.kernels.choice import (
    attention_note,
    check_attention,
    decode_kernel,
    fits,
    self_attention,
    with_attention,
)
from m3po_jax.models.kernels.fused_gpu import fused_attention
from m3po_jax.models.kernels.grouped_decode import block_shape
from m3po_jax.models.kernels.splash import block_size
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import build
from m3po_jax.models.vit import ViTConfig

KERNELS = {
    "pallas": partial(self_attention, kind="pallas_interpret"),
    "cudnn": partial(fused_attention, implementation="xla"),  # the same call, on XLA's implementation
}
DECODE = decode_kernel("pallas_interpret")
RAGGED = jax.jit(DECODE)


def draw(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def padding(tokens):
    """Three rows: padded at the end, at the start and inside, and not at all."""
    mask = np.ones((3, tokens), bool)
    mask[0, tokens // 2 :] = False
    mask[1, [0, 1, 7]] = False
    return mask


@pytest.mark.parametrize(
    ("kernel", "causal", "limits", "dtype", "tolerance"),
    [
        ("pallas", True, {}, jnp.float32, 2e-5),
        ("pallas", True, {"window": 7}, jnp.float32, 2e-5),
        ("pallas", True, {"window": 140}, jnp.float32, 2e-5),
        ("pallas", False, {}, jnp.float32, 2e-5),
        ("pallas", True, {}, jnp.bfloat16, 4e-2),
        ("pallas", True, {"soft_cap": 0.5}, jnp.float32, 2e-5),
        ("pallas", True, {"soft_cap": 0.5, "window": 7}, jnp.float32, 2e-5),
        ("cudnn", True, {}, jnp.float32, 2e-5),
        ("cudnn", True, {"spans": True}, jnp.float32, 2e-5),
        ("cudnn", True, {"spans": True, "window": 7}, jnp.float32, 2e-5),
        ("cudnn", True, {"window": 7}, jnp.float32, 2e-5),
        ("cudnn", False, {}, jnp.float32, 2e-5),
        ("cudnn", True, {}, jnp.bfloat16, 4e-2),
    ],
)
def test_self_attention_equals_the_xla_path(kernel, causal, limits, dtype, tolerance):
    rng = np.random.default_rng(0)
    tokens, heads, groups, width = 150, 4, 2, 16
    q = draw(rng, (3, tokens, heads, width), dtype)
    k, v = (draw(rng, (3, tokens, groups, width), dtype) for _ in range(2))
    mask = padding(tokens)
    weights = draw(rng, q.shape) * mask[:, :, None, None]  # padded positions mean nothing

    def run(attend):
        def loss(q, k, v):
            out = attend(q, k, v).astype(jnp.float32)
            return jnp.sum(weights * out), jnp.where(mask[:, :, None, None], out, 0)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    spans = Spans.of_runs(jnp.asarray(mask & (np.arange(tokens) % 40 > 9)), 30) if "spans" in limits else None
    limits = {name: value for name, value in limits.items() if name != "spans"}
    plain = run(partial(Causal(mask, spans=spans), **limits) if causal else Bidirectional(mask))
    if spans is not None:
        back = np.arange(tokens)[:, None] - np.arange(tokens)
        same = (spans.numbers[:, :, None] == spans.numbers[:, None]) & (spans.numbers[:, :, None] >= 0)
        limits["visible"] = ((back >= 0) | same) & (back < limits.get("window", tokens))
    fused = run(lambda q, k, v: KERNELS[kernel](q, k, v, mask, causal=causal, **limits))
    for expected, actual in zip(plain, fused, strict=True):
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def test_blocks_divide_and_fit():
    for lanes in range(1, 40):
        assert 128 * lanes % block_size(128 * lanes) == 0 and block_size(128 * lanes) <= 640
    for heads, tokens, width, itemsize in [(32, 640, 128, 2), (8, 4096, 128, 4), (7, 5, 64, 2), (1, 1100, 128, 2)]:
        h, block = block_shape(heads, tokens, width, itemsize)
        assert heads % h == 0 and block % 128 == 0
        assert h == 1 or h * block * max(width, 128) * itemsize <= 2**20
        assert -(-tokens // block) * block - tokens < block


def exact_prefix(q, k, v, length):
    """float64, and no key beyond the length is touched."""
    out, log_sum = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for n, count in enumerate(length):
        for g in range(q.shape[1]):
            keys, values = (np.asarray(x[n, g, :count], np.float64) for x in (k, v))
            scores = np.asarray(q[n, g], np.float64) @ keys.T * q.shape[-1] ** -0.5
            weights = np.exp(scores)
            if count:
                out[n, g], log_sum[n, g] = weights @ values / weights.sum(-1)[:, None], np.log(weights.sum(-1))
    return out, log_sum


@pytest.mark.parametrize(
    ("queries", "tokens", "dtype", "tolerance"),
    [
        (1, 128, jnp.float32, 1e-5),
        (15, 300, jnp.float32, 1e-5),  # 5 candidates of 3 query heads each
        (16, 1100, jnp.float32, 1e-5),
        (33, 200, jnp.bfloat16, 1e-2),
    ],
)
def test_prefix_attention_is_exact(queries, tokens, dtype, tolerance):
    """Two blocks and one, a full row, a short one, one that ends with a block and one without tokens."""
    rng = np.random.default_rng(1)
    q = draw(rng, (4, 2, queries, 16), dtype)
    length = np.array([tokens, 7, min(tokens, 128), 0])
    beyond = np.arange(tokens)[None, None, :, None] >= length[:, None, None, None]
    # What lies beyond the length must not matter, whatever it is.
    k, v = (jnp.where(beyond, jnp.nan, draw(rng, (4, 2, tokens, 16))).astype(dtype) for _ in range(2))
    out, top, total = jax.jit(DECODE)(q, k, v, length)
    expected, log_sum = exact_prefix(q, k, v, length)
    assert out.dtype == top.dtype == total.dtype == jnp.float32
    np.testing.assert_allclose(out[:3] / total[:3], expected[:3], atol=tolerance)
    np.testing.assert_allclose((top + jnp.log(total))[:3, ..., 0], log_sum[:3], atol=1e-4)
    assert np.all(out[3] == 0) and np.all(top[3] == 0) and np.all(total[3] == 0)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    length=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_prefix_attention_for_any_length(seed, length, scale):
    """Scores from all equal to one that dominates; `top` is the largest of them."""
    rng = np.random.default_rng(seed)
    q, k, v = (draw(rng, shape) for shape in [(2, 1, 3, 8), (2, 1, 300, 8), (2, 1, 300, 8)])
    out, top, total = RAGGED(scale * q, k, v, np.asarray(length))
    scores = scale * 8**-0.5 * np.einsum("ngmd,ngpd->ngmp", q, k)
    for n, count in enumerate(length):
        if count:
            np.testing.assert_allclose(top[n, ..., 0], scores[n, ..., :count].max(-1), atol=1e-4)
    np.testing.assert_allclose(out / np.maximum(total, 1e-30), exact_prefix(scale * q, k, v, length)[0], atol=3e-4)


def test_a_nan_in_a_key_is_not_hidden():
    q, k = jnp.ones((1, 1, 2, 16)), jnp.ones((1, 1, 130, 16)).at[0, 0, 3].set(jnp.nan)
    assert np.all(np.isnan(DECODE(q, k, jnp.ones_like(k), np.array([130]))[0]))


TINY = LlavaConfig(
    text=DecoderConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8),
    vision=ViTConfig("clip", EncoderConfig(16, 32, num_layers=2, num_heads=2), image_size=12, patch_size=4),
    image_token_id=60,
)


def answers_loss(config):
    """log-probs of two answers to each of two prompts with an image, and the gradient of their sum."""
    rng = np.random.default_rng(2)
    model = build(config, dtype=jnp.float32, param_dtype=jnp.float32)
    prompt = np.concatenate([np.full((2, 9), 60), rng.integers(0, 50, (2, 6))], axis=1).astype(np.int32)
    mask = np.arange(15) < np.array([[15], [12]])
    answers = rng.integers(0, 50, (2, 2, 5)).astype(np.int32)
    answer_mask = np.arange(5) < np.array([[[5], [2]], [[4], [5]]])
    pixels = jnp.asarray(rng.normal(size=(2, 1, 12, 12, 3)), jnp.float32)

    @jax.jit
    def run(state, pixels):
        def loss(state, pixels):
            model = nnx.merge(graph, state)
            features = encoded(model, pixels)
            log_probs = branch_log_probs(model, prompt, mask, features, answers, answer_mask, remat="full")
            return log_probs.sum(), log_probs

        (_, log_probs), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, pixels)
        return log_probs, grads

    graph, state = nnx.split(model)
    return run(state, pixels)


def test_a_model_scores_and_learns_the_same_through_the_kernels():
    """Prefix, branches and the vision tower, under rematerialisation and the scan over layers."""
    (expected, grads), (actual, kernel_grads) = (
        answers_loss(with_attention(TINY, kind)) for kind in ("xla", "pallas_interpret")
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(kernel_grads), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, float(jnp.abs(a).max())))


def test_with_attention_reaches_nested_configurations():
    config = with_attention(TINY, "pallas")
    assert config.text.attention == config.vision.encoder.attention == "pallas"
    assert with_attention(config, "xla") == TINY


@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_path_lowers_to_cudnn_in_both_directions(causal, monkeypatch):
    """No GPU is needed to see which call a program makes; jax asks for cuDNN's version first."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    shapes = [((2, 600, heads, 128), jnp.bfloat16) for heads in (8, 4, 4)] + [((2, 600), jnp.bool_)]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(q, k, v, mask):
        return self_attention(q, k, v, mask, causal=causal, kind="cudnn").astype(jnp.float32).sum()

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert f"{'CAUSAL' if causal else 'NO_MASK'}" in text


def heads_of(width):
    return dataclasses.replace(TINY.text, head_dim=width)


def test_what_a_kernel_cannot_run_is_refused_in_one_line():
    check_attention("xla", platform="cpu", dtype="float32", decoder=heads_of(7))
    check_attention("pallas", platform="tpu", dtype="float32", decoder=heads_of(128))
    check_attention("cudnn", platform="gpu", dtype="bfloat16", decoder=heads_of(80))
    # A tower of narrower heads than the language model's stays on XLA where they do not fit.
    assert fits("pallas", 64) and not fits("pallas", 72) and fits("cudnn", 72) and not fits("xla", 128)
    assert decode_kernel("cudnn") is decode_kernel("xla") is None
    cases = [
        ("palas", "tpu", "bfloat16", 128, "did you mean"),
        ("pallas", "cpu", "bfloat16", 128, "needs a TPU"),
        ("cudnn", "tpu", "bfloat16", 128, "needs an NVIDIA GPU"),
        ("cudnn", "gpu", "float32", 128, "not float32"),
        ("pallas", "tpu", "bfloat16", 80, "80 wide"),
        ("pallas", "tpu", "bfloat16", 64, "multiple of 128"),
        ("cudnn", "gpu", "float16", 256, "at most 128"),
    ]
    capped = dataclasses.replace(TINY.text, head_dim=128, attention_soft_cap=50.0)
    check_attention("pallas", platform="tpu", dtype="bfloat16", decoder=capped)
    with pytest.raises(UserError, match="cudnn has no soft cap"):
        check_attention("cudnn", platform="gpu", dtype="bfloat16", decoder=capped)
    spanned = dataclasses.replace(TINY.text, image_span=9)
    assert "read by XLA" in attention_note("pallas", spanned)
    for kind, decoder in (("cudnn", spanned), ("xla", spanned), ("pallas", capped)):
        assert attention_note(kind, decoder) == ""
    for kind, platform, dtype, width, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            check_attention(kind, platform=platform, dtype=dtype, decoder=heads_of(width))
        assert "\n" not in str(caught.value) and "model.attention" in str(caught.value)


def test_the_kernels_run_on_each_devices_own_rows_and_heads():
    worker = Path(__file__).with_name("mesh_kernels.py")
    env = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, str(worker)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
