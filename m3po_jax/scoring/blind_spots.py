"""Does the judge see more than the policy? A judge with the policy's eyes cannot correct it (docs/judges.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.errors import UserError
from m3po_jax.models.safetensors_io import open_directory

_PATCH_EMBEDDING = "embeddings.patch_embedding.weight"


def shared_blind_spots(
    policy_directory: str | Path,
    judge_directory: str | Path,
    policy_raw_config: dict[str, Any],
    judge_raw_config: dict[str, Any],
) -> str | None:
    """A warning where the judge cannot see what the policy does not see, else None.

    That is where both are the same model, or have the same vision encoder: towers of one shape whose patch
    embeddings are (nearly) parallel, so that a fine-tuned copy counts. Without stored weights the shape decides.
    """
    policy, judge = Path(policy_directory), Path(judge_directory)
    if policy.resolve() == judge.resolve():
        return "the judge is the policy itself: it shares the policy's blind spots, and MAS cannot correct them"
    shape = _tower_shape(policy_raw_config)
    if shape is None or shape != _tower_shape(judge_raw_config):
        return None
    ours, theirs = _patch_embedding(policy), _patch_embedding(judge)
    if ours is None or theirs is None:
        return (
            "the judge's vision encoder has the policy's shape; if it is the same one, both share their blind spots"
        )
    if ours.shape != theirs.shape or _cosine(ours, theirs) < 0.99:
        return None
    return "the judge has the policy's vision encoder: what it does not see, MAS cannot correct"


def _tower_shape(raw: dict[str, Any]) -> tuple[Any, ...] | None:
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        return None
    return tuple(vision.get(name) for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"))


def _patch_embedding(directory: Path) -> np.ndarray | None:
    try:
        tensors = open_directory(directory)
        patches = next((tensor for name, tensor in tensors.items() if name.endswith(_PATCH_EMBEDDING)), None)
        return None if patches is None else patches.read().astype(np.float64).ravel()
    except UserError:
        return None


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-30))
