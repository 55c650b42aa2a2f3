"""What a model sees of one row: token ids, pixels or features, each checked, errors naming the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from m3po_jax.data.collation import PromptRow
from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.image_buckets import ImageBuckets
from m3po_jax.data.model_images import ImagePlan, ProcessedImage, joined
from m3po_jax.data.schema import Prompt, PromptTokens
from m3po_jax.errors import UserError

Shown_co = TypeVar("Shown_co", covariant=True)


class ImageSource(Protocol[Shown_co]):
    """What reads a prompt's images, in the form that its models take."""

    def images(self, prompt: Prompt) -> Shown_co: ...

    def absent_images(self, prompt: Prompt) -> Shown_co:
        """Zeros that take no memory, where another host needs the prompt's images."""


class PromptProcessor(ImageSource[tuple[ProcessedImage, ...]], Protocol):
    """What the other pipelines need of `models.processor.Processor`."""

    @property
    def image_buckets(self) -> ImageBuckets | None:
        """Sizes that rows of images are filled up to; None: images are all of one size."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def tokenise(self, prompt: Prompt) -> PromptTokens: ...

    def encode_prompt(self, prompt: Prompt) -> Sequence[int] | np.ndarray: ...

    def encode_answer(self, text: str) -> Sequence[int] | np.ndarray: ...

    def image_plans(self, prompt: Prompt) -> list[ImagePlan]: ...

    def image_keys(self, prompt: Prompt) -> list[str]: ...


def images_of(processor: ImageSource[Shown_co], prompt: Prompt) -> Shown_co:
    """A prompt's images; whatever a decoder raises becomes one line that names the row."""
    try:
        return processor.images(prompt)
    except UserError:
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise UserError(
            f"cannot read the image ({type(error).__name__}: {error})",
            where=where_of(prompt),
            remedy="replace the image or drop the row",
        ) from error


def prompt_row(
    processor: PromptProcessor,
    prompt: Prompt,
    features: PromptFeatures | None = None,
    *,
    needed: bool = True,
    pixels: bool = True,
    shown: Sequence[ProcessedImage] | None = None,
    **more: Any,
) -> PromptRow:
    """A prompt as models take it.

    Args:
        features: Cached features of the vision tower, which then stand for the images.
        needed: False: zeros stand for pixels and features, which another host needs.
        pixels: False: no image is read, for who blanks them; how they lie is there.
        shown: Its images, where they are read already.
        more: Further fields of the row.
    """
    token_ids = np.asarray(processor.encode_prompt(prompt), np.int32)
    if shown is None:
        shown = _shown(processor, prompt, features, needed, pixels) if prompt.images else ()
    return PromptRow(prompt.id, token_ids, joined(shown, processor.image_buckets), **more)


def _shown(
    processor: PromptProcessor, prompt: Prompt, features: PromptFeatures | None, needed: bool, pixels: bool
) -> Sequence[ProcessedImage]:
    if not pixels:
        return [plan.filled() for plan in processor.image_plans(prompt)]
    if features is not None:
        return features(prompt) if needed else features.absent(prompt)
    return images_of(processor, prompt) if needed else processor.absent_images(prompt)


def checked_answer(ids: Sequence[int] | np.ndarray, limit: int, where: str) -> np.ndarray:
    """Token ids of one answer, checked: cutting an answer would teach the model to stop nowhere."""
    if len(ids) == 0:
        raise UserError("the answer has no tokens", where=where, remedy="drop the row")
    if len(ids) > limit:
        raise UserError(
            f"the answer has {len(ids)} tokens, more than train.max_answer_tokens = {limit}",
            where=where,
            remedy="raise it, or drop the row",
        )
    return np.asarray(ids, np.int32)


def where_of(prompt: Prompt) -> str:
    return prompt.where or f"id {prompt.id!r}"
