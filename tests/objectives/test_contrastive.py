"""The contrastive loss against transformers' SigLIP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.objectives import sigmoid_contrastive_loss

torch = pytest.importorskip("torch")


def embeddings(images=5, texts=5, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(images, width)).astype(np.float32), rng.normal(size=(texts, width)).astype(np.float32)


TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def oracle(model):
    """Loss of a randomly initialised transformers model on five pairs, and its gradient by the embeddings.

    `logits` normalises: at unit vectors, that projects the gradient onto the tangent of the sphere.
    """
    torch.manual_seed(0)
    output = model.eval()(
        input_ids=torch.randint(0, 49, (5, 8)), pixel_values=torch.randn(5, 3, 16, 16), return_loss=True
    )
    embeddings = (output.image_embeds, output.text_embeds)
    gradients = torch.autograd.grad(output.loss, embeddings)
    tangents = [g - (g * e).sum(-1, keepdim=True) * e for g, e in zip(gradients, embeddings, strict=True)]
    return (
        output.loss.item(),
        [e.detach().numpy() for e in embeddings],
        [t.detach().numpy() for t in tangents],
    )


def logits(image, text, scale, bias):
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    return scale * image @ text.T + bias


def check(loss, model):
    expected, points, gradients = oracle(model)
    value, found = jax.value_and_grad(loss, argnums=(0, 1))(*points)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_sigmoid_loss_equals_siglip():
    from transformers import SiglipConfig, SiglipModel

    model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VISION))
    model.logit_scale.data[:], model.logit_bias.data[:] = 1.3, -2.0
    labels = 2 * np.eye(5) - 1
    check(lambda i, t: sigmoid_contrastive_loss(logits(i, t, np.exp(1.3), -2.0), labels).mean(), model)


def test_several_positives_and_unknown_labels_against_a_loop():
    image, text = embeddings(images=3, texts=4, seed=2)
    labels = np.array([[1, 1, -1, 0], [-1, 1, -1, -1], [0, 0, 1, 1]])
    total = 0.0
    for i in range(3):
        for j in range(4):
            cosine = image[i] @ text[j] / np.linalg.norm(image[i]) / np.linalg.norm(text[j])
            if labels[i, j] != 0:
                total += np.log1p(np.exp(-labels[i, j] * (5.0 * cosine - 1.0)))
    np.testing.assert_allclose(
        sigmoid_contrastive_loss(logits(image, text, 5.0, -1.0), labels).mean(), total / 3, rtol=1e-5
    )
