"""The attention kernels against the XLA path: values, gradients, padding, grouped queries, types and meshes."""

from __future__ import annotations

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

from m3po_jax.errors import UserError
from m3po_jax.models import kernels
from m3po_jax.models.attention import Bidirectional, Causal
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.forward import branch_log_probs, encode_images
from m3po_jax.models.kernels import check_attention, merge, prefix_attention, with_attention
from m3po_jax.models.kernels.fused_gpu import fused_attention
from m3po_jax.models.kernels.grouped_decode import _blocks
from m3po_jax.models.kernels.splash import block_size
from m3po_jax.models.llama import LlamaConfig
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import build
from m3po_jax.models.vit import ViTConfig

KERNELS = {
    "pallas": partial(kernels.self_attention, kind="pallas_interpret"),
    "cudnn": partial(fused_attention, implementation="xla"),  # the same call, on XLA's implementation
}


def draw(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def padding(tokens):
    """Three rows: padded at the end, at the start and inside, and not at all."""
    mask = np.ones((3, tokens), bool)
    mask[0, tokens // 2 :] = False
    mask[1, [0, 1, 7]] = False
    return mask


@pytest.mark.parametrize(
    ("kernel", "causal", "dtype", "tolerance"),
    [
        ("pallas", True, jnp.float32, 2e-5),
        ("pallas", False, jnp.float32, 2e-5),
        ("pallas", True, jnp.bfloat16, 4e-2),
        ("cudnn", True, jnp.float32, 2e-5),
        ("cudnn", False, jnp.float32, 2e-5),
        ("cudnn", True, jnp.bfloat16, 4e-2),
    ],
)
def test_self_attention_equals_the_xla_path(kernel, causal, dtype, tolerance):
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

    plain = run(lambda q, k, v: (Causal if causal else Bidirectional)(mask)(q, k, v, None)[0])
    fused = run(lambda q, k, v: KERNELS[kernel](q, k, v, mask, causal=causal))
    for expected, actual in zip(plain, fused, strict=True):
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def test_blocks_divide_and_fit():
    for lanes in range(1, 40):
        assert 128 * lanes % block_size(128 * lanes) == 0 and block_size(128 * lanes) <= 640
    for heads, tokens, width, itemsize in [(32, 640, 128, 2), (8, 4096, 128, 4), (7, 5, 64, 2), (1, 1100, 128, 2)]:
        h, block = _blocks(heads, tokens, width, itemsize)
        assert heads % h == 0 and block % 128 == 0
        assert h == 1 or h * block * max(width, 128) * itemsize <= 2**20
        assert -(-tokens // block) * block - tokens < block


def exact_prefix(q, k, v, mask):
    """float64, one softmax at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("ngkrd,ngpd->ngkrp", q, k) * q.shape[-1] ** -0.5
    scores = np.where(mask[:, None, None, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return np.einsum("ngkrp,ngpd->ngkrd", weights / np.maximum(total, 1e-300), v), lse


@pytest.mark.parametrize("kind", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("candidates", "repeats", "tokens", "dtype", "tolerance"),
    [
        (1, 1, 128, jnp.float32, 1e-5),
        (5, 3, 300, jnp.float32, 1e-5),
        (16, 1, 1100, jnp.float32, 1e-5),
        (8, 2, 200, jnp.bfloat16, 1e-2),
    ],
)
def test_prefix_attention_is_exact(kind, candidates, repeats, tokens, dtype, tolerance):
    rng = np.random.default_rng(1)
    q = draw(rng, (3, 2, candidates, repeats, 16), dtype)
    k, v = (draw(rng, (3, 2, tokens, 16), dtype) for _ in range(2))
    mask = np.arange(tokens) < np.array([tokens, 7, 0])[:, None]  # a full row, a short one, one without tokens
    mask[0, [2, tokens // 2]] = False
    # What padding holds must not matter, whatever it is.
    k, v = (jnp.where(mask[:, None, :, None], x, 1e30).astype(dtype) for x in (k, v))
    out, lse = jax.jit(partial(prefix_attention, kind=kind))(q, k, v, mask)
    expected, expected_lse = exact_prefix(q, k, v, mask)
    assert out.dtype == lse.dtype == jnp.float32 and out.shape == q.shape and lse.shape == q.shape[:-1]
    np.testing.assert_allclose(out, expected, atol=tolerance)
    np.testing.assert_allclose(lse[:2], expected_lse[:2], atol=1e-4)
    assert np.all(np.isneginf(lse[2])) and np.all(np.asarray(out[2]) == 0)


def test_a_nan_in_a_key_is_not_hidden():
    q, k = jnp.ones((1, 1, 2, 1, 16)), jnp.ones((1, 1, 130, 16)).at[0, 0, 3].set(jnp.nan)
    for kind in ("xla", "pallas_interpret"):
        assert np.all(np.isnan(prefix_attention(q, k, jnp.ones_like(k), np.ones((1, 130), bool), kind=kind).out))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_parts_merge_to_the_whole(seed, share, scale):
    """Attention over any split of the keys, some parts empty, is attention over all of them."""
    rng = np.random.default_rng(seed)
    q, k, v = (draw(rng, shape) for shape in [(2, 1, 3, 1, 8), (2, 1, 24, 8), (2, 1, 24, 8)])
    q = scale * q
    seen = rng.random((2, 24)) < rng.random()
    first = rng.random((2, 24)) < share
    parts = [prefix_attention(q, k, v, seen & first), prefix_attention(q, k, v, seen & ~first)]
    np.testing.assert_allclose(merge(parts), exact_prefix(q, k, v, seen)[0], atol=2e-5)


TINY = LlavaConfig(
    text=LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8),
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
            features = encode_images(model, pixels)
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
        return kernels.self_attention(q, k, v, mask, causal=causal, kind="cudnn").astype(jnp.float32).sum()

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert f"{'CAUSAL' if causal else 'NO_MASK'}" in text


def test_what_a_kernel_cannot_run_is_refused_in_one_line():
    check_attention("xla", platform="cpu", dtype="float32", head_dim=7)
    check_attention("pallas", platform="tpu", dtype="float32", head_dim=128)
    check_attention("cudnn", platform="gpu", dtype="bfloat16", head_dim=80)
    cases = [
        ("palas", "tpu", "bfloat16", 128, "did you mean"),
        ("pallas", "cpu", "bfloat16", 128, "needs a TPU"),
        ("cudnn", "tpu", "bfloat16", 128, "needs an NVIDIA GPU"),
        ("cudnn", "gpu", "float32", 128, "not float32"),
        ("pallas", "tpu", "bfloat16", 80, "80 wide"),
        ("cudnn", "gpu", "float16", 256, "at most 128"),
    ]
    for kind, platform, dtype, width, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            check_attention(kind, platform=platform, dtype=dtype, head_dim=width)
        assert "\n" not in str(caught.value) and "model.attention" in str(caught.value)


def test_the_kernels_run_on_each_devices_own_rows_and_heads():
    worker = Path(__file__).with_name("mesh_kernels.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, str(worker)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
