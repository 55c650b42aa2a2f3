"""The shared-prefix forward pass: its gradients against torch's, and its vocabulary in chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import IMAGE, images, llava, saved, torch_and_transformers
from model_inputs import encoded

from m3po_jax.config import LoRAConfig
from m3po_jax.models import attention, lora
from m3po_jax.models import decoder as decoders
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.forward import branch_log_probs
from m3po_jax.models.layers import REMAT_POLICIES

TEXT = [1, *[IMAGE] * 4, 7, 8, 9]
ANSWERS = [[11, 12, 13, 2], [21, 2]]
WEIGHTS = [1.0, -0.5]  # of the answers' sums in the scalar whose gradients are compared


def batch() -> tuple[jax.Array, ...]:
    ids = jnp.asarray([[*TEXT, 0, 0]])
    branches = np.zeros((1, 2, 5), np.int32)
    for row, answer in enumerate(ANSWERS):
        branches[0, row, : len(answer)] = answer
    return ids, ids > 0, jnp.asarray(branches), jnp.asarray(branches > 0)


def value(model: Any, pixels: jax.Array, **options: Any) -> jax.Array:
    ids, mask, branches, branch_mask = batch()
    features = encoded(model, pixels)
    log_probs = branch_log_probs(model, ids, mask, features, branches, branch_mask, **options)
    return jnp.sum(jnp.asarray(WEIGHTS) * log_probs.sum(-1))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: Any) -> Any:
    """(our model, pixels, torch's value, torch's gradients) from one sequence an answer."""
    torch, _ = torch_and_transformers()
    peer = llava(seed=5, text={"num_key_value_heads": 2})
    pixels = images(1)
    total = 0.0
    for answer, weight in zip(ANSWERS, WEIGHTS, strict=True):
        tokens = torch.tensor([[*TEXT, *answer]])
        logits = peer(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=torch.tensor(pixels))
        log_probs = logits.logits.log_softmax(-1)[0, len(TEXT) - 1 : -1]
        total = total + weight * log_probs.gather(1, torch.tensor(answer)[:, None]).sum()
    total.backward()
    loaded = saved(peer, tmp_path_factory.mktemp("oracle")).model
    return loaded, jnp.asarray(pixels.transpose(0, 2, 3, 1))[None], float(total.detach()), peer


@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.parametrize("base_learns", [False, True])
def test_gradients_equal_torch(oracle: Any, remat: str, base_learns: bool) -> None:
    """One row with two branches against two sequences: the last layer's keys, the projector, the head and all."""
    model, pixels, wanted, peer = oracle
    graph, trained, rest = nnx.split(model, lambda path, _: path[0] != "vision_tower", ...)

    @jax.jit
    def ours(trained: Any) -> Any:
        loss = lambda t: value(nnx.merge(graph, t, rest), pixels, remat=remat, base_learns=base_learns)  # noqa: E731
        return jax.value_and_grad(loss)(trained)

    total, gradients = ours(trained)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    text, layers = peer.model.language_model, gradients["decoder"]["layers"]
    pairs = [
        (gradients["decoder"]["embed_tokens"]["table"], text.embed_tokens.weight.grad),
        (gradients["decoder"]["lm_head"]["kernel"], peer.lm_head.weight.grad.T),
        (gradients["projector"]["linear_1"]["kernel"], peer.model.multi_modal_projector.linear_1.weight.grad.T),
    ]
    for index, layer in enumerate(text.layers):
        for part, peers, names in (
            (layers["attention"], layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layers["mlp"], layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            pairs += [(part[name]["kernel"][...][index], getattr(peers, name).weight.grad.T) for name in names]
        pairs.append((layers["input_norm"]["scale"][...][index], layer.input_layernorm.weight.grad))
    for mine, theirs in pairs:
        found, expected = np.asarray(mine[...] if isinstance(mine, nnx.Variable) else mine), theirs.numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("tied", "cap"), [(False, None), (True, None), (False, 20.0)])
@pytest.mark.parametrize("width", [7, 64, 500])
def test_chunks_of_the_vocabulary_change_nothing(width: int, tied: bool, cap: float | None, monkeypatch: Any) -> None:
    """Values and gradients (adapter on the head, states), for widths that do not divide the vocabulary."""
    config = DecoderConfig(101, 16, 32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    config = dataclasses.replace(config, tie_word_embeddings=tied, logits_soft_cap=cap)
    decoder = decoders.Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    if not tied:
        decoder.lm_head.lora_a = nnx.Param(0.3 * jnp.ones((16, 2)))
        decoder.lm_head.lora_b = nnx.Param(jnp.sin(jnp.arange(202.0)).reshape(2, 101))
        decoder.lm_head.lora_scale = 0.5
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(3 * rng.normal(size=(3, 5, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 101, (3, 5)))
    graph, state = nnx.split(decoder)

    def loss(inputs: Any) -> tuple[jax.Array, Any]:
        state, hidden = inputs
        scores = nnx.merge(graph, state).token_scores(hidden, ids)
        return jnp.sum(scores.log_probs * jnp.cos(jnp.arange(15.0)).reshape(3, 5)), scores

    def both() -> Any:
        return jax.jit(jax.value_and_grad(loss, has_aux=True))((state, hidden))

    whole = both()
    np.testing.assert_allclose(whole[0][1].mean_logits, decoder.logits(hidden).mean(-1), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(decoders, "MAX_LOGITS", width * ids.size)
    program = str(jax.make_jaxpr(loss)((state, hidden)))
    assert (width >= 101) == ("3,5,101" in program)  # no array of all logits where they are chunked
    for wanted, found in zip(jax.tree.leaves(whole), jax.tree.leaves(both()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("width", [7, 200])
def test_token_scores_are_trls(width: int, monkeypatch: Any) -> None:
    """Log-probs, entropy and top-1 hits of TRL's head on the same logits, sharp and flat ones."""
    torch, _ = torch_and_transformers()
    trl = pytest.importorskip("trl.trainer.utils")
    config = DecoderConfig(101, 16, 32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    decoder = decoders.Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    hidden = np.logspace(-2, 2, 40)[:, None] * rng.normal(size=(40, 16))
    hidden = jnp.asarray(hidden.reshape(2, 20, 16), jnp.float32)
    logits = torch.tensor(np.asarray(decoder.logits(hidden)))
    ids = np.where(rng.random((2, 20)) < 0.5, logits.argmax(-1), rng.integers(0, 101, (2, 20)))
    monkeypatch.setattr(decoders, "MAX_LOGITS", width * ids.size)
    scores = jax.jit(lambda h: decoder.token_scores(h, jnp.asarray(ids)))(hidden)
    log_probs = trl.selective_log_softmax(logits, torch.tensor(ids))
    np.testing.assert_allclose(scores.log_probs, log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, trl.entropy_from_logits(logits), rtol=1e-5, atol=3e-5)
    np.testing.assert_array_equal(scores.is_top1, (logits.argmax(-1) == torch.tensor(ids)).numpy())
    assert scores.entropy.max() > 4.6 and scores.entropy.min() < 0.01


@pytest.mark.parametrize(
    ("window", "cap", "spans"),
    [
        *((window, None, False) for window in (None, 1, 7, 100, 300)),
        *((None, 0.5, False), (None, None, True), (7, 0.5, True)),
    ],
)
def test_causal_blocks_equal_one_masked_square(
    window: int | None, cap: float | None, spans: bool, monkeypatch: Any
) -> None:
    """Rows longer than a block, left and right padding, grouped heads; values and gradients in one comparison.

    Blocks of 16 queries leave whole blocks of keys outside the shorter windows; spans reach over two of them.
    """
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 200, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    mask = np.ones((2, 200), bool)
    mask[0, :30], mask[1, 150:] = False, False

    member = mask & (np.arange(200) % 50 >= 15)
    own = attention.Spans.of_runs(jnp.asarray(member), 35) if spans else None

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("bshd,bthd->bhst", q, k) * 8**-0.5
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        back = np.arange(200)[:, None] - np.arange(200)
        same = (np.arange(200)[:, None] // 50 == np.arange(200) // 50) & member[:, :, None] & member[:, None, :]
        seen = ((back >= 0) | (same & spans)) & (back < (window or 200)) & mask[:, None, :]
        seen = seen[:, None]
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), v)

    def run(attend: Any) -> Any:
        loss = lambda *x: jnp.sum(jnp.where(mask[..., None, None], jnp.sin(3 * attend(*x)), 0.0))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    blocked = run(lambda q, k, v: attention.causal_attention(q, k, v, jnp.asarray(mask), window, cap, own))
    for found, wanted in zip(jax.tree.leaves(blocked), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_adapters_alone_have_the_same_gradients_with_and_without_the_short_scan(oracle: Any) -> None:
    model, pixels, *_ = oracle
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    lora.attach(
        model,
        LoRAConfig(lora_rank=2, target_modules=["q_proj", "v_proj", "down_proj"]),
        scope="decoder",
        rngs=nnx.Rngs(0),
    )
    for linear in lora.adapters(model).values():
        linear.lora_b[...] = jnp.full(linear.lora_b.shape, 0.1)
    graph, trained, rest = nnx.split(model, lora.LoRAParam, ...)

    def run(**options: Any) -> Any:
        return jax.jit(jax.grad(lambda t: value(nnx.merge(graph, t, rest), pixels, **options)))(trained)

    short = run(remat="dots")
    for found, wanted in zip(jax.tree.leaves(short), jax.tree.leaves(run(base_learns=True)), strict=True):
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(wanted).max()))
