"""Images of the prompts that a backend scores: each host reads those of its own devices' rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from m3po_jax.data.row_inputs import PixelProcessor, no_pixels
from m3po_jax.data.schema import Prompt
from m3po_jax.hosts.agreement import load_shared


def shared_pixels(
    processor: PixelProcessor, prompts: Sequence[Prompt], needed: Sequence[bool] | Bool[np.ndarray, " n"]
) -> list[Float32[np.ndarray, "m h w 3"]]:
    """Pixels of each prompt's images; zeros where this process does not need them. All processes call it together.

    Raises:
        UserError: an image that cannot be read; on all hosts.
    """
    here = [bool(row) and bool(prompt.images) for row, prompt in zip(needed, prompts, strict=False)]
    return load_shared(
        lambda place: processor.pixel_values(prompts[place]), lambda place: no_pixels(processor, prompts[place]), here
    )
