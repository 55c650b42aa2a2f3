import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.objectives import token_nll

torch = pytest.importorskip("torch")


def token_mean(log_probs, mask):
    total, count = token_nll(log_probs, mask)
    return total / jnp.maximum(count, 1)


def test_equals_token_mean_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (3, 5))
    mask = np.arange(5) < np.array([5, 2, 1])[:, None]
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 7),
        torch.tensor(np.where(mask, labels, -100)).reshape(-1),
        ignore_index=-100,
    )
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_mean(log_probs, jnp.asarray(mask)), expected, rtol=1e-6)
    # Token-weighted, so micro-batches add up to the batch.
    parts = [token_nll(log_probs[i : i + 1], jnp.asarray(mask[i : i + 1])) for i in range(3)]
    np.testing.assert_allclose(sum(p[0] for p in parts) / sum(p[1] for p in parts), expected, rtol=1e-6)


def test_padding_never_enters():
    log_probs = jnp.asarray([[-1.0, jnp.nan], [-3.0, -jnp.inf]])
    mask = jnp.asarray([[1, 0], [1, 0]])
    value, gradient = jax.value_and_grad(token_mean)(log_probs, mask)
    assert value == 2.0
    np.testing.assert_array_equal(gradient, [[-0.5, 0], [-0.5, 0]])
    assert token_mean(log_probs, mask * 0) == 0.0
