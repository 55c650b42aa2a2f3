"""What a model sees of one row: token ids, pixels or features, each checked, errors naming the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.image_buckets import ImageBuckets
from m3po_jax.data.model_images import ImagePlan, Images, ProcessedImage, joined
from m3po_jax.data.schema import Prompt
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


def seen_images(
    processor: PromptProcessor, prompt: Prompt, features: PromptFeatures | None, *, needed: bool = True
) -> Images:
    """The arrays of a prompt's images, of pixels or of cached features; zeros where they are not needed."""
    if not prompt.images:
        return {}
    if features is not None:
        shown = features(prompt) if needed else features.absent(prompt)
    else:
        shown = images_of(processor, prompt) if needed else processor.absent_images(prompt)
    return joined(shown, processor.image_buckets)


def image_layout(processor: PromptProcessor, prompt: Prompt) -> Images:
    """The integer arrays of a prompt's images, which blank ones have too; no pixel is read."""
    plans = processor.image_plans(prompt) if prompt.images else []
    return joined([plan.filled() for plan in plans], processor.image_buckets)


def prompt_ids(processor: PromptProcessor, prompt: Prompt) -> np.ndarray:
    return np.asarray(processor.encode_prompt(prompt), np.int32)


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
