"""What every training loss returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class LossOutput(NamedTuple):
    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    row_losses: Float[Array, " b"]
