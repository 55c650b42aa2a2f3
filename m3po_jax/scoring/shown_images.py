"""Images of the prompts that a backend scores: each host reads those of its own devices' rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool

from m3po_jax.data.row_inputs import ImageSource
from m3po_jax.data.schema import Prompt
from m3po_jax.hosts.agreement import load_shared

Shown = TypeVar("Shown")


def shared_images(
    processor: ImageSource[Shown], prompts: Sequence[Prompt], needed: Sequence[bool] | Bool[np.ndarray, " n"]
) -> list[Shown]:
    """Each prompt's images as the processor gives them; absent ones where this process does not need them. All
    processes call it together.

    Raises:
        UserError: an image that cannot be read; on all hosts.
    """
    here = [bool(row) and bool(prompt.images) for row, prompt in zip(needed, prompts, strict=False)]
    return load_shared(
        lambda place: processor.images(prompts[place]), lambda place: processor.absent_images(prompts[place]), here
    )
