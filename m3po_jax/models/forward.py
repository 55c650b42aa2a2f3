"""The contract of a vision-language model, and the forward pass that scores given answers under any of them.

Confidence, judges, reference and policy of the preference loss are `branch_scores`. It runs the prompt, with its
images, once for all of its answers. Answers are drawn in `inference/`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import FEATURES, Images, layout_of
from m3po_jax.models.attention import Causal, Spans, Tree, prefix_positions
from m3po_jax.models.decoder import Decoder, TokenScores
from m3po_jax.models.decoder_config import DecoderConfig

# The parts of a model whose names settings and messages know: its images' encoder, and what maps features to the
# decoder's width.
VISION_TOWER, PROJECTOR = "vision_tower", "projector"


class Positions(NamedTuple):
    """Where the tokens of prompts stand for the rotary embedding, and where what follows them goes on.

    Attributes:
        of_prompt: One number a token, or one for each of several axes, see `DecoderConfig.rotary_axes`.
        following: Of the first token after the prompt, the same on every axis; it goes on from there one by one.
    """

    of_prompt: Int[Array, "b s *axes"]
    following: Int[Array, " b"]


class EncodedImages(NamedTuple):
    """Images of a batch after the tower.

    Attributes:
        features: That of a row's j-th image token is the row's j-th; what lies beyond them is not read.
        layout: The images' integer arrays, see `data.model_images`.
    """

    features: Float[Array, "b f v"]
    layout: Images


class PromptInputs(NamedTuple):
    """What the decoder reads of prompts.

    Attributes:
        x: Its inputs.
        injected: What is added to the states after each of the first layers; None: nothing.
        spans: The images whose tokens see each other, see `DecoderConfig.image_span`; None: no image's do.
    """

    x: Float[Array, "b s d"]
    positions: Positions
    injected: Float[Array, "l b s d"] | None
    spans: Spans | None


class VisionLanguageConfig(Protocol):
    """What shared code reads of a configuration; a dataclass, whose fields called `attention` name kernels."""

    @property
    def text(self) -> DecoderConfig: ...

    @property
    def image_token_id(self) -> int:
        """The id that stands for one feature; −1, which no token has, where the model reads text alone."""


class VisionLanguageModel(Protocol):
    """What a family provides: a module with a `decoder`, and with images a part called `VISION_TOWER`.

    Images of a batch are arrays by name, see `data.model_images`; rows without images, and what fills rows up, may
    give any features.
    """

    @property
    def config(self) -> Any:
        """A `VisionLanguageConfig` of the family."""

    @property
    def decoder(self) -> Decoder: ...

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """What the tower makes of a batch's images, before what learns with the decoder: a cache may keep it."""

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "b f v"]:
        """The features of images of the mean colour that lie as `layout` says, `tokens` of a row; one row may stand
        for all."""

    def embed_prompts(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"] | None
    ) -> Float[Array, "b s d"]:
        """Decoder inputs: token embeddings, with features in the places of image tokens, in order."""

    def injected_states(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"]
    ) -> Float[Array, "l b s d"]:
        """What is added to prompts' states after each of the first `DecoderConfig.injected_layers` layers; not asked
        for where there are none."""

    def prompt_positions(self, token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], layout: Images) -> Positions:
        """How rotary positions run through prompts; `text_positions` where images change nothing about it."""


def encode_images(model: VisionLanguageModel, images: Images | None, *, remat: str = "none") -> EncodedImages | None:
    """A batch's images after the tower: the features that they bring along, or computed ones; None without images."""
    if not images:
        return None
    features = images.get(FEATURES)
    return EncodedImages(
        model.encode_images(images, remat=remat) if features is None else features, layout_of(images)
    )


def blank_images(model: VisionLanguageModel, layout: Images, rows: int, tokens: int) -> EncodedImages:
    """Blank images in the places of a batch's own: the mean colour, at the same sizes.

    Args:
        tokens: The most image tokens that a row has.
    """
    features = model.blank_features(layout, tokens)
    return EncodedImages(jnp.broadcast_to(features, (rows, *features.shape[1:])), layout)


def text_positions(mask: Bool[Array, "b s"]) -> Positions:
    """Unpadded tokens counted from 0."""
    return Positions(prefix_positions(mask), jnp.sum(mask, axis=1, dtype=jnp.int32))


def place_features(
    x: Float[Array, "b s d"], is_image: Bool[Array, "b s"], features: Float[Array, "b f d"]
) -> Float[Array, "b s d"]:
    """Embeddings with the row's j-th feature in the place of its j-th image token."""
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    return jnp.where(is_image[..., None], jnp.take_along_axis(features, order[..., None], axis=1), x)


def embedded_prompts(
    model: VisionLanguageModel,
    token_ids: Int[Array, "b s"],
    mask: Bool[Array, "b s"],
    images: EncodedImages | None,
) -> PromptInputs:
    """What the decoder reads of prompts."""
    features, layout = (None, {}) if images is None else images
    text = model.config.text
    injected = spans = None
    if features is not None and text.injected_layers:
        injected = model.injected_states(token_ids, features)
    if features is not None and text.image_span:
        spans = Spans.of_runs((token_ids == model.config.image_token_id) & mask, text.image_span)
    x, positions = model.embed_prompts(token_ids, features), model.prompt_positions(token_ids, mask, layout)
    return PromptInputs(x, positions, injected, spans)


def branch_hidden(
    model: VisionLanguageModel,
    prefix_ids: Int[Array, "b p"],
    prefix_mask: Bool[Array, "b p"],
    images: EncodedImages | None,
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
    prefix, places, injected, spans = embedded_prompts(model, prefix_ids, prefix_mask, images)
    branches = model.decoder.embed_tokens(branch_ids[:, :, :t].reshape(b, k * t)).astype(prefix.dtype)
    following = places.following[:, None, None] + jnp.arange(t)[None, None, :]
    following = jnp.broadcast_to(following, (b, k, t)).reshape(b, k * t)
    axes = places.of_prompt.shape[2:]
    following = jnp.broadcast_to(following.reshape(b, k * t, *(1,) * len(axes)), (b, k * t, *axes))
    positions = jnp.concatenate([places.of_prompt, following], axis=1)
    tree = Tree(prefix_mask, branch_mask[:, :, :t], model.decoder.config.attention, spans)
    x = jnp.concatenate([prefix, branches], axis=1)
    hidden = model.decoder.needed_states(
        x, positions, tree, tree.last, injected, remat=remat, base_learns=base_learns
    )
    first = jnp.broadcast_to(hidden[:, None, :1], (b, k, 1, hidden.shape[-1]))
    return jnp.concatenate([first, hidden[:, 1:].reshape(b, k, t, hidden.shape[-1])], axis=2)


def branch_scores(
    model: VisionLanguageModel,
    prefix_ids: Int[Array, "b p"],
    prefix_mask: Bool[Array, "b p"],
    images: EncodedImages | None,
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
        model, prefix_ids, prefix_mask, images, branch_ids, branch_mask, remat=remat, base_learns=base_learns
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


def reference_forward(
    model: VisionLanguageModel, token_ids: Int[Array, "b s"], mask: jax.Array, images: EncodedImages | None
) -> Float[Array, "b s vocab"]:
    """Plain causal logits at every position, for tests and small tools."""
    real = mask.astype(bool)
    x, positions, injected, spans = embedded_prompts(model, token_ids, real, images)
    return model.decoder.logits(model.decoder(x, positions.of_prompt, Causal(real, spans=spans), injected))
