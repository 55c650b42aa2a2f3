"""The forward pass that scores given answers, for any vision-language model of the registry.

Confidence, judges, reference and policy of the preference loss are `branch_scores`. It runs the prompt, with its
images, once for all of its answers. Answers are drawn in `inference/`.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.attention import Tree, prefix_positions
from m3po_jax.models.decoder import Decoder, TokenScores


class VisionLanguageModel(Protocol):
    """What a family provides; see `llava/model.py` for shapes."""

    config: Any
    decoder: Decoder

    def image_features(self, pixel_values: jax.Array, *, remat: str = "none") -> jax.Array:
        """Images [I, H, W, 3] to the tower's features [I, N, V]."""

    def embed_prompts(self, token_ids: jax.Array, features: jax.Array | None) -> jax.Array:
        """Token ids [B, S] and features [B, M, N, V] of their images to decoder inputs [B, S, D]."""


def encode_images(
    model: VisionLanguageModel, pixel_values: Float[Array, "b m h w 3"] | None, *, remat: str = "none"
) -> Float[Array, "b m n v"] | None:
    """Tower features of each row's images; None (or m = 0) for text-only batches."""
    if pixel_values is None or pixel_values.shape[1] == 0:
        return None
    b, m = pixel_values.shape[:2]
    features = model.image_features(pixel_values.reshape(b * m, *pixel_values.shape[2:]), remat=remat)
    return features.reshape(b, m, *features.shape[1:])


def branch_hidden(
    model: VisionLanguageModel,
    prefix_ids: Int[Array, "b p"],
    prefix_mask: Bool[Array, "b p"],
    features: Float[Array, "b m n v"] | None,
    branch_ids: Int[Array, "b k t"],
    branch_mask: Bool[Array, "b k t"],
    *,
    remat: str = "none",
    base_learns: bool = False,
) -> Float[Array, "b k t d"]:
    """Hidden states from which each branch token is predicted.

    Token 0 of a branch is predicted from the prompt's last token, token t from the branch's token t − 1; nothing is
    predicted from a branch's last token, which is therefore not computed. `base_learns` says that weights other than
    adapters get gradients (see `Decoder.needed_states`).
    """
    b, k, t = branch_ids.shape
    t -= 1
    prefix = model.embed_prompts(prefix_ids, features)
    branches = model.decoder.embed_tokens(branch_ids[:, :, :t].reshape(b, k * t)).astype(prefix.dtype)
    lengths = jnp.sum(prefix_mask, axis=1)
    branch_positions = lengths[:, None, None] + jnp.arange(t)[None, None, :]
    positions = jnp.concatenate(
        [prefix_positions(prefix_mask), jnp.broadcast_to(branch_positions, (b, k, t)).reshape(b, k * t)],
        axis=1,
    )
    tree = Tree(prefix_mask, branch_mask[:, :, :t], model.decoder.config.attention)
    hidden = model.decoder.needed_states(
        jnp.concatenate([prefix, branches], axis=1), positions, tree, tree.last, remat=remat, base_learns=base_learns
    )
    first = jnp.broadcast_to(hidden[:, None, :1], (b, k, 1, hidden.shape[-1]))
    return jnp.concatenate([first, hidden[:, 1:].reshape(b, k, t, hidden.shape[-1])], axis=2)


def branch_scores(
    model: VisionLanguageModel,
    prefix_ids: Int[Array, "b p"],
    prefix_mask: Bool[Array, "b p"],
    features: Float[Array, "b m n v"] | None,
    branch_ids: Int[Array, "b k t"],
    branch_mask: Bool[Array, "b k t"],
    *,
    remat: str = "none",
    base_learns: bool = False,
) -> TokenScores:
    """Each branch token's `TokenScores` [b, k, t] given image, prompt and earlier tokens; 0 and false where masked.

    The prompt is encoded once for its k branches, and logits exist at branch positions only.
    """
    hidden = branch_hidden(
        model, prefix_ids, prefix_mask, features, branch_ids, branch_mask, remat=remat, base_learns=base_learns
    )
    scores = states_scores(model, hidden, branch_ids)
    return TokenScores(*(jnp.where(branch_mask, x, jnp.zeros((), x.dtype)) for x in scores))


def branch_log_probs(*inputs: Any, remat: str = "none", base_learns: bool = False) -> Float[Array, "b k t"]:
    """log π(token | image, prompt, earlier tokens of the branch) in nats, temperature 1; 0 where masked.

    Args:
        inputs: As of `branch_scores`.
    """
    return branch_scores(*inputs, remat=remat, base_learns=base_learns).log_probs


def states_scores(
    model: VisionLanguageModel, hidden: Float[Array, "b k t d"], branch_ids: Int[Array, "b k t"]
) -> TokenScores:
    """Each token's `TokenScores` [b, k, t] given the state that predicts it (see `branch_hidden`), float32."""
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
    scores = model.decoder.token_scores(flat(hidden), flat(branch_ids))
    return TokenScores(*(x.reshape(branch_ids.shape) for x in scores))
