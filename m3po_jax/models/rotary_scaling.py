"""How the frequencies of rotary positions are stretched for longer texts than a decoder began with.

Each kind is a `rope_type` of a ``config.json``, computed as transformers' `modeling_rope_utils` computes it. Those
whose frequencies depend on the length of the text at hand (``dynamic``, ``longrope``) are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float32

Frequencies = Float32[np.ndarray, " half_d"]


@dataclass(frozen=True)
class LinearScaling:
    """Positions lie `factor` times as dense (Chen et al., arXiv:2306.15595)."""

    factor: float

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """Radians a token of each of the D/2 frequencies; `plain` are theirs without scaling, of base `theta`."""
        return plain / np.float32(self.factor)

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones stay, others are blended (Llama 3.1, arXiv:2407.21783).

    Low and high are the wavelengths `original_max_position_embeddings` / `low_freq_factor` and / `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """See `LinearScaling.frequencies`."""
        turns = self.original_max_position_embeddings * plain / np.float32(2 * math.pi)
        high = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(high, 0.0, 1.0).astype(np.float32)
        return share * plain + (1 - share) * plain / np.float32(self.factor)

    @property
    def magnitude(self) -> float:
        """See `LinearScaling.magnitude`."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Frequencies of few turns are divided by `factor`, those of many stay (YaRN: Peng et al., arXiv:2309.00071).

    Attributes:
        beta_fast, beta_slow: Turns within the original length from which on, and up to which, these are.
        attention_factor: Of cosines and sines; None: what the paper says of `factor`.
        mscale, mscale_all_dim: What DeepSeek's models make it of instead.
        truncate: The range between the two is widened to whole numbers of frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """See `LinearScaling.frequencies`."""
        width = 2 * len(plain)

        def place(turns: float) -> float:
            """Of the frequency with so many turns, counted in frequencies."""
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(theta))

        low, high = place(self.beta_fast or 32.0), place(self.beta_slow or 1.0)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (np.arange(len(plain), dtype=np.float32) - low) / max(high - low, 1e-3)
        divided = np.clip(ramp, 0.0, 1.0).astype(np.float32)
        return divided * plain / np.float32(self.factor) + (1 - divided) * plain

    @property
    def magnitude(self) -> float:
        """See `LinearScaling.magnitude`."""
        if self.attention_factor is not None:
            return self.attention_factor
        of = lambda scale: 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0  # noqa: E731
        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling
SCALINGS: Mapping[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


_ORIGINAL = "original_max_position_embeddings"


def scaling_kind(parameters: Mapping[str, Any]) -> Any:
    """The `rope_type` of rotary parameters, under either of its names; a name where they are valid."""
    return parameters.get("rope_type", parameters.get("type")) or "default"


def needed(kind: str) -> tuple[str, ...]:
    """What parameters of a kind have to state."""
    if kind not in SCALINGS:
        return ()
    return tuple(part.name for part in fields(SCALINGS[kind]) if part.default is MISSING and part.name != _ORIGINAL)


def rotary_scaling(parameters: Mapping[str, Any], max_positions: int) -> RotaryScaling | None:
    """What checked ``rope_parameters`` say; None: no scaling.

    Args:
        max_positions: Stands for the original length where they do not state it.
    """
    scaling = SCALINGS.get(scaling_kind(parameters))
    if scaling is None:
        return None
    names = {field.name for field in fields(scaling)}
    stated = {name: parameters[name] for name in names if parameters.get(name) is not None}
    if _ORIGINAL in names:
        stated.setdefault(_ORIGINAL, max_positions)
    return scaling(**stated)
