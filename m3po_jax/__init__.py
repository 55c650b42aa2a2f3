"""M3PO: multimodal-model-guided preference optimization for large vision-language models, in JAX.

The stages are functions here, see `m3po_jax.api` and docs/library.md; they are imported when they are first used, so
that ``import m3po_jax`` alone loads neither JAX nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from m3po_jax.version import __version__

if TYPE_CHECKING:
    from m3po_jax.api import Model as Model
    from m3po_jax.api import Selection as Selection
    from m3po_jax.api import evaluate as evaluate
    from m3po_jax.api import export as export
    from m3po_jax.api import generate as generate
    from m3po_jax.api import load_model as load_model
    from m3po_jax.api import read_prompts as read_prompts
    from m3po_jax.api import score as score
    from m3po_jax.api import select as select
    from m3po_jax.api import train as train
    from m3po_jax.errors import UserError as UserError
    from m3po_jax.objectives.pair_loss import preference_loss as preference_loss

_STAGES = ("evaluate", "export", "generate", "load_model", "read_prompts", "score", "select", "train")
_HOMES = {
    "UserError": "m3po_jax.errors",
    "preference_loss": "m3po_jax.objectives.pair_loss",
    **dict.fromkeys(("Model", "Selection", *_STAGES), "m3po_jax.api"),
}
__all__ = [
    "Model",
    "Selection",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "preference_loss",
    "read_prompts",
    "score",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
