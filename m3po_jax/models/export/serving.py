"""Whether vLLM serves an adapter, and with which flags.

vLLM (vllm/lora/peft_helper.py, vllm/config/lora.py) refuses `modules_to_save`, takes adapters of the language model's
layers alone, and knows a handful of values for the largest rank.
"""

from __future__ import annotations

from collections.abc import Collection

_DEFAULT_RANK = 16  # of --max-lora-rank
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
_INSTEAD = "export the merged model with --format huggingface"


def vllm_hint(rank: int, *, trained_projector: bool = False, parts: Collection[str] = ()) -> str | None:
    """What one has to know to serve an adapter by vLLM; None where its defaults suffice.

    Args:
        trained_projector: The adapter brings a projector along as `modules_to_save`.
        parts: The parts of the model beside its language model that the adapter reaches, e.g. ``vision_tower``.
    """
    if trained_projector:
        return f"vLLM serves no adapter with a trained projector: {_INSTEAD}"
    if parts:
        return f"vLLM serves no adapter of the {' and the '.join(sorted(parts)).replace('_', ' ')}: {_INSTEAD}"
    if rank > _RANKS[-1]:
        return f"vLLM serves no adapter of rank {rank} (at most {_RANKS[-1]}): {_INSTEAD}"
    if rank <= _DEFAULT_RANK:
        return None
    needed = next(value for value in _RANKS if value >= rank)
    return f"vLLM needs --enable-lora --max-lora-rank {needed} for this adapter"
